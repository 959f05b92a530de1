"""SAM over several devices and processes: `python -m examples.distributed`.

    python -m examples.distributed                 # eight devices that the CPU pretends to have
    python -m examples.distributed --processes 2   # as many, in two processes of this machine
    srun python -m examples.distributed --cluster  # those of a cluster, as JAX finds them

All three train the same network and print the same losses. The parameters are cut over all devices
(fully sharded), each process makes its own part of each batch, and the optimiser is the one for a
single device: its state lies as the parameters lie, its norms are those of the whole tree.
"""

import argparse
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flatopt

INPUTS, WIDTH, BATCH_SIZE = 16, 64, 64
ATTEMPTS = 3  # Another program may take the free port that was found.


def optimizer() -> optax.GradientTransformationExtraArgs:
    """SAM on SGD, with the mean of the last weights."""
    return optax.chain(
        flatopt.sam(0.05), optax.sgd(0.05, momentum=0.9), flatopt.swa(start=10, every=2)
    )


def init(key: jax.Array) -> dict[str, jax.Array]:
    """A network of one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (INPUTS, WIDTH)) / INPUTS**0.5,
        "bias": jnp.zeros(WIDTH),
        "second": jax.random.normal(second, (WIDTH,)) / WIDTH**0.5,
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean square error."""
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["second"] - y))


def examples(step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """These rows of a batch: the same in whatever process they are made."""
    numbers = range(BATCH_SIZE)[rows]
    x = np.stack([np.random.default_rng([step, n]).normal(size=INPUTS) for n in numbers])
    return x.astype(np.float32), np.sin(x[:, 0] + x[:, 1] * x[:, 2]).astype(np.float32)


def batch(step: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """A global batch, of which each process makes what its own devices hold."""
    split = NamedSharding(mesh, PartitionSpec("data"))

    def part(which: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.make_array_from_callback(
            shape, split, lambda index: examples(step, (index or ())[0])[which]
        )

    return part(0, (BATCH_SIZE, INPUTS)), part(1, (BATCH_SIZE,))


def fully_sharded(mesh: Mesh, tree: Any) -> Any:
    """Each leaf is cut along the first axis that the number of devices divides."""

    def sharding(x: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(x.shape) if n and n % mesh.size == 0]
        return NamedSharding(
            mesh, PartitionSpec(*[None] * axes[0], "data") if axes else PartitionSpec()
        )

    return jax.tree.map(sharding, tree)


def train(steps: int, report: Callable[[int, float], None]) -> tuple[Any, Any]:
    """Trains on all devices of all processes; returns the parameters and the optimiser's state."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    tx = optimizer()

    @jax.jit
    def train_step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        grad_fn = flatopt.make_grad_fn(loss_fn, x, y)
        loss, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    with jax.set_mesh(mesh):
        key = jax.random.key(0)
        shardings = fully_sharded(mesh, jax.eval_shape(init, key))
        params = jax.jit(init, out_shardings=shardings)(key)
        opt_state = jax.jit(tx.init)(params)
        for step in range(steps):
            params, opt_state, loss = train_step(params, opt_state, *batch(step, mesh))
            report(step, float(loss))
    return params, opt_state


def launch(processes: int, devices: int, arguments: Sequence[str]) -> None:
    """Starts this program as several processes of this machine, and waits for them."""
    for attempt in range(ATTEMPTS):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "examples.distributed", *arguments]
        command += ["--processes", str(processes), "--devices", str(devices)]
        command += ["--coordinator", f"localhost:{port}"]
        started = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
        codes = [_wait(process, started) for process in started]
        if not any(codes):
            return
        print(f"attempt {attempt + 1}: the processes ended with {codes}", file=sys.stderr)
    raise SystemExit("The processes did not finish.")


def _wait(process: subprocess.Popen[bytes], others: Sequence[subprocess.Popen[bytes]]) -> int:
    """The end of one process; a failure ends the others, which would wait for it in vain."""
    code = process.wait()
    if code:
        for other in others:
            other.kill()
    return code


def main(argv: Sequence[str] | None = None) -> None:
    """Trains in this process, or starts those that do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=20)
    add("--devices", type=int, default=8, help="fake devices in all (%(default)s)")
    add("--processes", type=int, default=1, help="processes on this machine (%(default)s)")
    add("--cluster", action="store_true", help="the devices of a cluster, or of this machine")
    add("--save", type=Path, help="write the averaged parameters here, as npz")
    add("--coordinator", help=argparse.SUPPRESS)
    add("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.processes < 1 or args.devices % args.processes or args.steps < 1:
        parser.error("--processes must divide --devices, and --steps be at least 1.")

    if args.cluster:
        jax.distributed.initialize()  # Slurm, TPU pods, GKE and MPI tell it all it needs.
    elif args.coordinator:
        jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    elif args.processes > 1:
        save = ["--save", str(args.save)] if args.save else []
        return launch(args.processes, args.devices, ["--steps", str(args.steps), *save])
    else:
        jax.config.update("jax_num_cpu_devices", args.devices)

    def report(step: int, loss: float) -> None:
        if jax.process_index() == 0 and step in (0, args.steps - 1):
            where = f"{jax.device_count()} devices, {jax.process_count()} processes"
            print(f"{where}: loss {loss:.6f} after {step} steps", flush=True)

    params, opt_state = train(args.steps, report)
    mean = multihost_utils.process_allgather(flatopt.eval_params(opt_state, params), tiled=True)
    if args.save and jax.process_index() == 0:
        np.savez(args.save, **mean)
    if jax.process_count() > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
