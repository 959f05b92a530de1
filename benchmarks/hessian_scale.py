"""Top-10 Hessian eigenvalues of a network with a million parameters on 10 000 images.

`python -m benchmarks.hessian_scale --data-dir DIR`, where DIR holds `fashion_mnist.npz` in the
format of `benchmarks/compare/README.md`.
"""

import argparse
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import hessian_common as common
from benchmarks import record
from benchmarks.compare import datasets
from flatopt import measures

SIZES = (784, 1024, 256, 10)
K, IMAGES, BATCHES = 10, 10_000, 20


def main() -> None:
    """Trains for a while, then measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "hessian_scale.json")
    args = parser.parse_args()

    dataset = datasets.load("fashion_mnist", args.data_dir)
    pixels = dataset.images[:IMAGES].astype(np.float32)
    x = jnp.asarray((pixels - dataset.shift) / dataset.scale)
    y = jnp.asarray(dataset.labels[:IMAGES])
    params = common.init_mlp(0, SIZES)
    params = common.train(params, x, y, optax.sgd(0.02, momentum=0.9), args.steps, 128, seed=1)
    data = (x.reshape((BATCHES, -1, x.shape[1])), y.reshape((BATCHES, -1)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{parameters} parameters, loss {float(common.loss_fn(params, (x, y))):.4f}")

    began = time.perf_counter()
    cpu_began = time.process_time()
    result = jax.block_until_ready(measures.top_eigenvalues(common.loss_fn, params, data, k=K))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    print(f"{seconds:.1f} s ({cpu_seconds:.1f} CPU s), {int(result.num_products)} products")
    print(result.values, result.converged)

    def memory(batches: int) -> int:
        """Temporary bytes of the compiled measure, for so many batches of the same size."""
        shapes = tuple(jax.ShapeDtypeStruct((batches, *d.shape[1:]), d.dtype) for d in data)
        measure = jax.jit(lambda p, d: measures.top_eigenvalues(common.loss_fn, p, d, k=K))
        analysis = measure.lower(params, shapes).compile().memory_analysis()
        assert analysis is not None, "this backend does not analyse memory"
        return analysis.temp_size_in_bytes

    record.write(
        args.out,
        {
            "parameters": parameters,
            "images": IMAGES,
            "batches": BATCHES,
            "training_steps": args.steps,
            "k": K,
            "seconds_with_compilation": seconds,
            "cpu_seconds_with_compilation": cpu_seconds,
            "products": int(result.num_products),
            "eigenvalues": np.asarray(result.values).tolist(),
            "residuals": np.asarray(result.residuals).tolist(),
            "converged": np.asarray(result.converged).tolist(),
            "temporary_bytes": {str(n): memory(n) for n in (BATCHES, 10 * BATCHES)},
            "largest_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    )


if __name__ == "__main__":
    main()
