"""Barriers between independently trained networks on digits, before and after flatopt's remedies.

`python -m benchmarks.connectivity`: linear barrier, the same after permutation alignment, after
rescaling and alignment, on the geodesic, and on trained Bezier curves and polygonal chains.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import optax

from benchmarks import hessian_common as common
from benchmarks import record
from flatopt import curves, measures

SIZES = (64, 256, 256, 10)
TRAIN, STEPS, BATCH = 1000, 1500, 50
CURVE_STEPS = 3000


def main() -> None:
    """Trains pairs of networks, measures every path between them and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "connectivity.json")
    args = parser.parse_args()
    train, test = common.flat_digits(TRAIN)
    pairs = [compare(2 * i, train, test) for i in range(args.pairs)]
    for name in pairs[0]["loss_barrier"]:
        loss, error = (
            np.array([p[f"{k}_barrier"][name] for p in pairs]) for k in ("loss", "error")
        )
        print(f"{name:32} loss {loss.mean():.4f}  error {100 * error.mean():.2f} %")
    settings = {"sizes": SIZES, "train_images": TRAIN, "steps": STEPS, "batch_size": BATCH}
    record.write(args.out, {**settings, "curve_steps": CURVE_STEPS, "pairs": pairs})


def compare(seed: int, train: Any, test: Any) -> dict[str, Any]:
    """Trains two networks from different starts, and measures the paths between them."""
    x, y = train
    first, second = (
        common.train(
            common.init_mlp(s, SIZES), x, y, optax.sgd(0.05, momentum=0.9), STEPS, BATCH, seed=s
        )
        for s in (seed, seed + 1)
    )
    units = measures.chain_units(first)
    aligned = measures.align_units(first, second, units).params
    scaled = [measures.rescale_units(p, units) for p in (first, second)]
    matched = measures.align_units(scaled[0], scaled[1], units).params
    straight = {
        "linear": (first, second),
        "linear, aligned": (first, aligned),
        "linear, rescaled": (scaled[0], scaled[1]),
        "linear, rescaled and aligned": (scaled[0], matched),
    }
    rng = np.random.default_rng(seed)
    batches = [(x[r], y[r]) for r in rng.integers(0, len(x), size=(CURVE_STEPS, BATCH))]
    bent = {}
    for name, basis, num_bends in (
        ("Bezier", curves.bezier, 3),
        ("polychain", curves.polychain, 3),
    ):
        controls = curves.control_points([first, second], num_bends)
        schedule = optax.cosine_decay_schedule(0.05, CURVE_STEPS)
        tx = optax.sgd(schedule, momentum=0.9)
        bent[name] = (
            curves.train(common.loss_fn, controls, tx, batches, basis=basis, key=seed),
            basis,
        )
    result: dict[str, Any] = {"seeds": [seed, seed + 1]}
    for kind, function in (("loss", common.loss_fn), ("error", common.error_fn)):
        heights = {
            name: float(measures.linear_barrier(function, *ends, [train]).height)
            for name, ends in straight.items()
        }
        geodesic = measures.geodesic_barrier(function, scaled[0], matched, [train], units=units)
        heights["geodesic, rescaled and aligned"] = float(geodesic.height)
        for name, (controls, basis) in bent.items():
            profile = curves.evaluate(function, controls, [train], basis=basis)
            heights[name] = float(measures.barrier_height(*profile))
        result[f"{kind}_barrier"] = heights
        result[f"train_{kind}"] = [float(function(p, train)) for p in (first, second)]
        result[f"test_{kind}"] = [float(function(p, test)) for p in (first, second)]
    return result


if __name__ == "__main__":
    main()
