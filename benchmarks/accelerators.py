"""What a step of each method asks of a GPU or a TPU, from XLA's compiled program alone.

    python -m benchmarks.accelerators --target h100 --json benchmarks/results/accelerator_h100.json

XLA compiles for a device that it is only told about: nothing runs, no such device has to be there,
and the numbers do not wobble. `h100` needs `jax[cuda12]`, `v5e` needs `jax[tpu]`.
"""

import argparse
import collections
import os
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from tqdm import tqdm

from benchmarks import by_hand, memory, methods, models, record
from benchmarks.models import Problem

# The limits of an NVIDIA H100, as XLA wants to be told.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
      package: the installed package that compiles for it.
      describe: returns the topology with the device.
    """

    package: str
    describe: Callable[[], Any]


def _h100() -> Any:
    return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")


def _v5e() -> Any:
    # Else the library asks the network for the TPUs that it stands beside.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


TARGETS = {"h100": Target("jax-cuda12-pjrt", _h100), "v5e": Target("libtpu", _v5e)}

# 6.3, 26 and 2.7 million parameters, kept in float32 whatever is computed in.
MODELS: dict[str, Callable[[str], Problem]] = {
    "mlp": lambda dtype: models.mlp(dtype=dtype),
    "transformer": lambda dtype: models.transformer(512, 8, 256, 768, 32, dtype),
    "wide_resnet": lambda dtype: models.wide_resnet(dtype=dtype),
}
DTYPES = ["float32", "bfloat16"]
# Every method on the MLP; on the others what most users take, and independent gradients.
FEW = [*methods.MAIN, "rwp", "replicated_sgd 3 replicas"]
ONCE_IN_A_WHILE = "in a turn"
# Instructions of a scheduled program that launch nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
    "conditional", "call", "opt-barrier", "partition-id", "copy-done",
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def num_kernels(text: str) -> dict[str, int]:
    """Kernels, library calls and copies that a compiled program launches, by their kind.

    Those in a loop count as often as it turns. A loop whose number of turns is known only when it
    runs is, in these programs, what a method does once in a while: its turn is counted apart, and
    so is what the longer one of two branches launches more.
    """
    computations, entry = _computations(text)

    def count(name: str) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            kind = match[1] if match else ""
            if kind == "while":
                body = count(_named("body", line))
                trips = _TRIPS.search(line)
                if trips:
                    found.update({k: int(trips[1]) * n for k, n in body.items()})
                else:
                    found[ONCE_IN_A_WHILE] += body.total()
            elif kind == "call":
                found.update(count(_named("to_apply", line)))
            elif kind == "conditional":
                short, long = sorted((count(b) for b in _branches(line)), key=lambda c: c.total())
                found.update(short)
                found[ONCE_IN_A_WHILE] += long.total() - short.total()
            elif kind and kind not in _FREE:
                found["call" if kind == "custom-call" else kind] += 1
        return found

    return dict(count(entry))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that is run."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _branches(line: str) -> list[str]:
    if match := re.search(r"\bbranch_computations=\{([^}]*)\}", line):
        return [name.strip(" %") for name in match[1].split(",")]
    return [_named("true_computation", line), _named("false_computation", line)]


def _named(field: str, line: str) -> str:
    match = re.search(rf"\b{field}=%?([\w.\-]+)", line)
    assert match, line
    return match[1]


def compile_for(device: Any, problem: Problem, step: Any, init: Any) -> Any:
    """The donated step, compiled for `device`, which need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_device(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    carry = jax.eval_shape(init, problem.params)
    lowered = by_hand.compiled(step(problem.loss_fn)).lower(
        on_device(carry), on_device(problem.batch)
    )
    return lowered.compile()


def measure(device: Any, problem: Problem, names: list[str]) -> dict[str, Any]:
    """Rows of one model."""
    others = {a.name: a.method for a in by_hand.alternatives() if a.method in names}
    variants = by_hand.variants([*names, *others])
    copy = memory.num_bytes(problem.params)
    rows: list[dict[str, Any]] = []
    plans: dict[str, dict[str, float]] = {}
    for name, (step, init) in tqdm(variants.items(), desc=problem.name, disable=None):
        base = methods.base_of(others.get(name, name))
        program = compile_for(device, problem, step, init)
        cost = program.cost_analysis() or {}
        plans[name] = {
            "temporary": program.memory_analysis().temp_size_in_bytes / copy,
            **{kind: cost[kind] for kind in ("flops", "bytes accessed") if kind in cost},
        }
        row: dict[str, Any] = {"variant": name, "base": base, **plans[name]}
        row["temporary_over_base"] = plans[name]["temporary"] - plans[base]["temporary"]
        for kind in plans[name].keys() - {"temporary"}:
            row[f"{kind} over base"] = plans[name][kind] / plans[base][kind]
        if device.platform == "gpu":
            row["kernels"] = num_kernels(program.as_text())
        rows.append(row)
    leaves = len(jax.tree.leaves(problem.params))
    return {"sizes": problem.sizes, "leaves": leaves, "parameter_bytes": copy, "rows": rows}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    settings = results["settings"]
    text = [f"Compiled for {settings['device']} by {settings['package']}; nothing ran.", ""]
    for title, result in results["models"].items():
        has_kernels = "kernels" in result["rows"][0]
        heads = (
            ["kernels", "over its base", "more in a turn"]
            if has_kernels
            else ["flops over its base", "bytes over its base"]
        )
        text += [
            f"{title}, {result['leaves']} leaves, a copy is {result['parameter_bytes']:,} bytes:",
            "",
            f"| step | {' | '.join(heads)} | temporary copies over its base |",
            f"| --- |{' ---: |' * (len(heads) + 1)}",
        ]
        base = {row["variant"]: row for row in result["rows"]}
        for row in result["rows"]:
            if has_kernels:
                number = _each_step(row)
                turn = row["kernels"].get(ONCE_IN_A_WHILE)
                share = number / _each_step(base[row["base"]])
                cells = [str(number), f"{share:.2f}", "" if turn is None else str(turn)]
            else:
                cells = [f"{row[f'{kind} over base']:.2f}" for kind in ("flops", "bytes accessed")]
            # Adding 0.0 takes the sign from a rounded minus zero.
            cells.append(f"{round(row['temporary_over_base'], 2) + 0.0:.2f}")
            text.append(f"| {row['variant']} | {' | '.join(cells)} |")
        text.append("")
    return text[:-1]


def _each_step(row: dict[str, Any]) -> int:
    return sum(n for kind, n in row["kernels"].items() if kind != ONCE_IN_A_WHILE)


def main() -> None:
    """Compiles, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", choices=TARGETS, required=True, help="what to compile for")
    add("--models", default=",".join(MODELS), help="commas between (%(default)s)")
    add("--dtypes", default=",".join(DTYPES), help="to compute in, commas between (%(default)s)")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    for name in args.models.split(","):
        if name not in MODELS:
            parser.error(f"--models: {name!r} is none of {', '.join(MODELS)}.")
    for dtype in args.dtypes.split(","):
        if dtype not in DTYPES:
            parser.error(f"--dtypes: {dtype!r} is none of {', '.join(DTYPES)}.")
    target = TARGETS[args.target]
    try:
        version = metadata.version(target.package)
    except metadata.PackageNotFoundError:
        parser.error(f"--target {args.target} needs the package {target.package}.")
    # The weights are made on the CPU.
    jax.config.update("jax_platforms", "cpu")
    device = target.describe().devices[0]
    results = {
        f"{name}, {dtype}": measure(
            device, MODELS[name](dtype), list(methods.METHODS) if name == "mlp" else FEW
        )
        for name in args.models.split(",")
        for dtype in args.dtypes.split(",")
    }
    settings = {"device": device.device_kind, "package": f"{target.package} {version}"}
    print("\n".join(lines({"settings": settings, "models": results})))
    if args.json:
        record.write(args.json, {"settings": settings, "models": results})


if __name__ == "__main__":
    main()
