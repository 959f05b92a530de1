"""How the cost of a step grows with parameters, leaves, ascent steps, L, replicas and devices.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json

Of parameters and leaves, the loss is a quadratic that costs next to nothing: what is measured is
the optimiser. The devices are fake ones that share this machine's cores, in a process of their own:
they show what partitioning costs, not what it gains.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import flatopt
from benchmarks import by_hand, methods, models, record, timing
from benchmarks.models import Problem

GAMMA = 0.1  # Of the local entropy.
BASE = "sgd"
METHODS = ["sgd", "sam", "msam", "swa"]
LARGEST_INTERLEAVED = 10_000_000
LEAVES_TOTAL = 200_000
WIDTHS = (256, 256, 256, 256, models.CLASSES)
DEVICES = 8


def quadratic(sizes: Iterable[int]) -> Problem:
    """Half the squared norm of leaves of these sizes."""
    params = [jnp.ones(n) for n in sizes]

    def loss_fn(params: Any, scale: jax.Array) -> jax.Array:
        return 0.5 * scale * sum(jnp.vdot(p, p) for p in params)

    return Problem("quadratic", params, loss_fn, (jnp.ones([]),), {})  # type: ignore[arg-type]


def measure_point(
    builds: dict[str, methods.Build], problem: Problem, repeats: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds, ratios and compile seconds of each optimiser on one problem."""
    turns: dict[str, timing.Turn] = {}
    compile_seconds = {}
    for name, build in builds.items():
        tx = build()
        step = by_hand.compiled(by_hand.with_flatopt(tx, problem.loss_fn))
        init = by_hand.init_of(tx)
        began = time.perf_counter()
        carry = jax.eval_shape(init, problem.params)
        program = step.lower(carry, problem.batch).compile()
        compile_seconds[name] = time.perf_counter() - began
        turns[name] = _fresh_turn(program, init, problem)
    seconds = timing.interleaved_seconds(turns, repeats, steps)
    return {
        name: {
            "milliseconds": timing.summary([1e3 * s for s in values]),
            "over_base": timing.ratio(values, seconds[BASE]),
            "compile_seconds": compile_seconds[name],
        }
        for name, values in seconds.items()
    }


def _fresh_turn(program: Any, init: Callable[[Any], Any], problem: Problem) -> timing.Turn:
    """A turn that makes its carry anew: many large ones do not fit into memory at once."""

    def turn(steps: int) -> float:
        carry = by_hand.fresh_carry(init, problem.params)
        jax.block_until_ready(carry)
        return timing.turn_of(program, carry, problem.batch)(steps)

    return turn


def parameters(quick: bool, repeats: int) -> dict[int, Any]:
    """Numbers of parameters, in ten leaves; one step a turn where a step is long."""
    points = {}
    for size in [10**k for k in range(4, 7 if quick else 9)]:
        problem = quadratic([size // 10] * 10)
        steps = max(1, min(100, LARGEST_INTERLEAVED // size))
        points[size] = measure_point(_builds(METHODS), problem, repeats, steps)
    return points


def leaves(quick: bool, repeats: int) -> dict[int, Any]:
    """Numbers of leaves, of the same parameters in all."""
    numbers = (1, 10, 100) if quick else (1, 10, 100, 500, 2000)
    return {
        n: measure_point(_builds(METHODS), quadratic([LEAVES_TOTAL // n] * n), repeats, 10)
        for n in numbers
    }


def ascent_steps(quick: bool, repeats: int) -> dict[int, Any]:
    """Steps of ascent before the descent gradient; 0 is plain SGD."""

    def build(number: int) -> methods.Build:
        stage = flatopt.gradient_at(flatopt.scale_to_norm(methods.RHO), num_steps=number)
        return lambda: optax.chain(stage, methods.sgd())

    return _against_sgd(build, "gradient_at", (1, 3) if quick else (1, 2, 3, 5, 8), repeats)


def inner_steps(quick: bool, repeats: int) -> dict[int, Any]:
    """L of `local_entropy`."""

    def build(number: int) -> methods.Build:
        stage = flatopt.local_entropy(number, GAMMA)
        return lambda: optax.chain(stage, methods.sgd())

    return _against_sgd(build, "local_entropy", (1, 5) if quick else (1, 2, 5, 10, 20), repeats)


def replicas(quick: bool, repeats: int) -> dict[int, Any]:
    """Replicas of `replicated_sgd`, on one device."""

    def build(number: int) -> methods.Build:
        return lambda: flatopt.replicated_sgd(methods.sgd(), number, 0.1)

    return _against_sgd(build, "replicated_sgd", (1, 4) if quick else (1, 2, 4, 8), repeats)


def devices(quick: bool, repeats: int) -> dict[int, Any]:
    """Devices over which the batch is split; needs as many, see `_in_process_with_devices`."""
    points = {}
    problem = models.mlp(WIDTHS)
    for number in (1, 4) if quick else (1, 2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:number]), ("data",))
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        placed = problem._replace(
            params=jax.device_put(problem.params, whole),
            batch=jax.device_put(problem.batch, split),
        )
        points[number] = measure_point(_builds(["sgd", "sam"]), placed, repeats, 20)
    return points


PARTS: dict[str, Callable[[bool, int], dict[int, Any]]] = {
    "parameters": parameters,
    "leaves": leaves,
    "ascent_steps": ascent_steps,
    "inner_steps": inner_steps,
    "replicas": replicas,
    "devices": devices,
}


def _builds(names: list[str]) -> dict[str, methods.Build]:
    return {name: methods.METHODS[name] for name in names}


def _against_sgd(
    build: Callable[[int], methods.Build], name: str, numbers: tuple[int, ...], repeats: int
) -> dict[int, Any]:
    problem = models.mlp(WIDTHS)
    builds = {BASE: methods.sgd}
    return {n: measure_point(builds | {name: build(n)}, problem, repeats, 20) for n in numbers}


def _in_process_with_devices(quick: bool, repeats: int) -> dict[int, Any]:
    """`devices`, in a process whose CPU pretends to be eight."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "devices.json"
        command = [sys.executable, "-m", "benchmarks.scaling", "--parts", "devices", "--here"]
        command += ["--repeats", str(repeats), "--json", str(path), *(["--quick"] if quick else [])]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["parts"]["devices"]


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for part, points in results["parts"].items():
        text += [
            f"| {part.replace('_', ' ')} | step | ms | over sgd | compile, s |",
            "| ---: | --- | ---: | ---: | ---: |",
        ]
        for number, rows in points.items():
            for name, row in rows.items():
                r = row["over_base"]
                text.append(
                    f"| {int(number):,} | {name} | {row['milliseconds']['median']:.3g} "
                    f"| {r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}] "
                    f"| {row['compile_seconds']:.2f} |"
                )
        text.append("")
    return text[:-1]


def main() -> None:
    """Measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="commas between (%(default)s)")
    add("--repeats", type=int, help="interleaved rounds (7; 2 with --quick)")
    add("--quick", action="store_true", help="few points and rounds")
    add("--here", action="store_true", help="use this process's devices, make no fake ones")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    repeats = args.repeats or (2 if args.quick else 7)
    if repeats < 1:
        parser.error("--repeats must be at least 1.")
    results = {}
    for part in tqdm(args.parts.split(","), disable=None):
        if part not in PARTS:
            parser.error(f"--parts: {part!r} is none of {', '.join(PARTS)}.")
        apart = part == "devices" and not args.here
        function = _in_process_with_devices if apart else PARTS[part]
        points = function(args.quick, repeats)
        results[part] = {str(number): rows for number, rows in points.items()}
    print("\n".join(lines({"parts": results})))
    if args.json:
        record.write(args.json, {"settings": {"repeats": repeats}, "parts": results})


if __name__ == "__main__":
    main()
