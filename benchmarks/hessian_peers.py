"""Top-5 Hessian eigenvalues by flatopt and by PyTorch libraries: accuracy and time.

`python -m benchmarks.hessian_peers --peer-python PATH`, where PATH is a Python that has PyTorch,
curvlinops-for-pytorch, pyhessian and hessian-eigenthings; it may be another environment. All get
the same trained network, the same images in the same batches, and run in turn, one at a time and
on one thread: on small networks threads cost more than they give, most of all on a busy machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before jax is imported: one thread, as the libraries get.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from jax.flatten_util import ravel_pytree

from benchmarks import hessian_common as common
from benchmarks import record
from flatopt import measures

PEERS = ("curvlinops", "pyhessian", "hessian_eigenthings")
SIZES = (64, 32, 16, 10)  # Small enough for a dense Hessian in float64: the reference.
K, IMAGES, BATCHES = 5, 1000, 4
TOLERANCE = 1e-4  # Relative, of an eigenvalue.


def main() -> None:
    """Trains, measures in turn, compares and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "hessian_peers.json")
    args = parser.parse_args()

    digits = sklearn.datasets.load_digits()
    x = jnp.asarray(digits.data[:IMAGES] / 16, jnp.float32)
    y = jnp.asarray(digits.target[:IMAGES], jnp.int32)
    params = common.init_mlp(0, SIZES)
    params = common.train(params, x, y, optax.sgd(0.1, momentum=0.9), 300, 100, seed=1)
    data = (x.reshape((BATCHES, -1, 64)), y.reshape((BATCHES, -1)))
    exact = dense_eigenvalues(params, (x, y))

    def ours() -> np.ndarray:
        result = measures.top_eigenvalues(common.loss_fn, params, data, k=K, tolerance=1e-4)
        assert bool(result.converged.all())
        return np.asarray(result.values)

    began = time.perf_counter()
    values = {"flatopt": ours()}
    first_call = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in ("flatopt", *PEERS)}
    versions: dict[str, str] = {}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.npz"
        export(path, params, data)
        worker = Path(__file__).with_name("hessian_peer_worker.py")
        command = [args.peer_python, str(worker), str(path), str(K)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            for number in range(args.rounds + 1):  # The first round warms up.
                began = time.perf_counter()
                ours()
                if number:
                    seconds["flatopt"].append(time.perf_counter() - began)
                for name in PEERS:
                    if name in errors:
                        continue
                    process.stdin.write(name + "\n")
                    process.stdin.flush()
                    answer = json.loads(process.stdout.readline())
                    if "error" in answer:
                        errors[name] = answer["error"]
                        continue
                    values[name] = np.array(answer["values"])
                    versions |= {name: answer["version"], "torch": answer["torch"]}
                    if number:
                        seconds[name].append(answer["seconds"])
            process.stdin.close()

    rows = []
    for name, own in values.items():
        ratios = np.array(seconds["flatopt"]) / np.array(seconds[name])
        rows.append(
            {
                "library": name,
                "eigenvalues": own.tolist(),
                "largest_relative_error": float(np.max(np.abs(own - exact) / np.abs(exact))),
                "seconds_median": float(np.median(seconds[name])),
                "seconds_range": [min(seconds[name]), max(seconds[name])],
                "ratio_flatopt_to_it_median": float(np.median(ratios)),
                "ratio_flatopt_to_it_range": [float(ratios.min()), float(ratios.max())],
            }
        )
        print(
            f"{name:20} error {rows[-1]['largest_relative_error']:.1e}  "
            f"{rows[-1]['seconds_median']:.3f} s  ratio {np.median(ratios):.2f} "
            f"[{ratios.min():.2f}, {ratios.max():.2f}]"
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    record.write(
        args.out,
        {
            "k": K,
            "parameters": parameters,
            "images": IMAGES,
            "batches": BATCHES,
            "rounds": args.rounds,
            "threads": 1,
            "dense_float64_eigenvalues": exact.tolist(),
            "tolerance": TOLERANCE,
            "all_within_tolerance": all(r["largest_relative_error"] <= TOLERANCE for r in rows),
            "flatopt_first_call_seconds": first_call,
            "peer_versions": versions,
            "peer_errors": errors,
            "rows": rows,
        },
    )


def dense_eigenvalues(params: object, batch: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """The largest eigenvalues of the dense Hessian in float64."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        flat, unravel = ravel_pytree(double)
        data = (jnp.asarray(batch[0], jnp.float64), batch[1])
        gradient = jax.grad(lambda w: common.loss_fn(unravel(w), data))

        @jax.jit
        def columns(start: jax.Array) -> jax.Array:
            indices = start + jnp.arange(64)
            basis = (indices[:, None] == jnp.arange(flat.size)[None]).astype(flat.dtype)
            return jax.vmap(lambda v: jax.jvp(gradient, (flat,), (v,))[1])(basis)

        blocks = [columns(i) for i in range(0, flat.size, 64)]
        hessian = np.concatenate([np.asarray(b) for b in blocks])[: flat.size]
    return np.linalg.eigvalsh((hessian + hessian.T) / 2)[::-1][:K]


def export(path: Path, params: dict, data: tuple[jax.Array, jax.Array]) -> None:
    """Writes the network and the data for the worker."""
    arrays = {"layers": np.array(len(params)), "x": np.asarray(data[0]), "y": np.asarray(data[1])}
    for i in range(len(params)):
        arrays[f"kernel{i}"] = np.asarray(params[f"Dense_{i}"]["kernel"])
        arrays[f"bias{i}"] = np.asarray(params[f"Dense_{i}"]["bias"])
    np.savez(path, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
