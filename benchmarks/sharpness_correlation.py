"""Do flatter networks generalise better? Rank correlations of every measure with test accuracy.

`python -m benchmarks.sharpness_correlation`: small networks on digits, over optimisers, learning
rates, batch sizes and seeds, all trained to (almost) zero training error.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import scipy.stats

import flatopt
from benchmarks import hessian_common as common
from benchmarks import record
from flatopt import measures

SIZES = (64, 64, 64, 10)
TRAIN, IMAGES_SEEN = 300, 60_000
RATES, BATCHES = (0.01, 0.03, 0.1), (10, 30, 100)
# Optimiser -> the stage that it chains before SGD with momentum.
STAGES: dict[str, Callable[[], Any]] = {
    "sgd": optax.identity,
    "sam": lambda: flatopt.sam(0.1),
    "asam": lambda: flatopt.asam(0.5),
    "decay": lambda: optax.add_decayed_weights(1e-3),
}
DRAWS = 1000


def main() -> None:
    """Trains, measures, correlates and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "sharpness_correlation.json")
    args = parser.parse_args()
    train, test = common.flat_digits(TRAIN)
    data = jax.tree.map(lambda leaf: leaf[None], train)
    judge = jax.jit(lambda params, data: _measure(params, data))

    runs = []
    for name, rate, batch_size in itertools.product(STAGES, RATES, BATCHES):
        steps = IMAGES_SEEN // batch_size
        schedule = optax.cosine_decay_schedule(rate, steps)
        tx = optax.chain(STAGES[name](), optax.sgd(schedule, momentum=0.9))
        for seed in range(args.seeds):
            params = common.init_mlp(seed, SIZES)
            params = common.train(params, *train, tx, steps, batch_size, seed=seed)
            found = {key: float(value) for key, value in judge(params, data).items()}
            runs.append(
                {
                    "optimizer": name,
                    "learning_rate": rate,
                    "batch_size": batch_size,
                    "seed": seed,
                    "train_error": float(common.error_fn(params, train)),
                    "test_accuracy": 1 - float(common.error_fn(params, test)),
                    "measures": found,
                }
            )
    fitted = [run for run in runs if run["train_error"] <= 0.01 and _finite(run)]
    groups = {"all": fitted, **{n: [r for r in fitted if r["optimizer"] == n] for n in STAGES}}
    correlations = {group: _correlate(members) for group, members in groups.items()}
    for measure, row in correlations["all"].items():
        by_optimizer = "  ".join(
            f"{n} {correlations[n][measure]['spearman']:+.2f}" for n in STAGES if correlations[n]
        )
        low, high = row["interval_95"]
        print(f"{measure:28} {row['spearman']:+.2f} [{low:+.2f}, {high:+.2f}]  {by_optimizer}")
    record.write(
        args.out,
        {
            "sizes": SIZES,
            "train_images": TRAIN,
            "images_seen": IMAGES_SEEN,
            "runs_in_all": len(runs),
            "runs_fitted": len(fitted),
            "sign": "positive: the LARGER the measure (the sharper), the better the test accuracy",
            "correlations": correlations,
            "runs": runs,
        },
    )


def _measure(params: Any, data: Any) -> dict[str, jax.Array]:
    """Every measure of sharpness of one network; larger is sharper."""
    loss_fn, error_fn = common.loss_fn, common.error_fn
    units = measures.chain_units(params)
    normalised = measures.rescale_units(params, units)
    return {
        "largest eigenvalue": measures.top_eigenvalues(loss_fn, params, data).values[0],
        "largest eigenvalue, rescaled": measures.top_eigenvalues(loss_fn, normalised, data).values[
            0
        ],
        "trace": measures.trace(loss_fn, params, data).value,
        "Fisher trace": measures.fisher_trace(common.logits, params, data, num_samples=4).value,
        "gradient norm": measures.gradient_norm(loss_fn, params, data),
        "SAM sharpness": measures.sam_sharpness(loss_fn, params, data, rho=0.1),
        "adaptive sharpness, worst": measures.adaptive_sharpness(
            loss_fn, params, data, rho=0.5
        ).value,
        "adaptive sharpness, average": measures.adaptive_sharpness(
            loss_fn, params, data, rho=0.2, case="average"
        ).value,
        "Keskar sharpness": measures.keskar_sharpness(loss_fn, params, data, method="projected"),
        "local energy": measures.local_energy(
            error_fn, params, data, sigmas=[0.5], num_samples=64
        ).energy[0],
        "1 / PAC-Bayes sigma": 1
        / measures.pac_bayes_sigma(error_fn, params, data, target=0.1).sigma,
        "4-bit gap": measures.quantisation_gap(loss_fn, params, data, bits=4),
    }


def _finite(run: dict[str, Any]) -> bool:
    return bool(np.isfinite(list(run["measures"].values())).all())


def _correlate(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation of each measure with test accuracy, with a bootstrap interval."""
    if len(runs) < 5:
        return {}
    accuracy = np.array([run["test_accuracy"] for run in runs])
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(runs), size=(DRAWS, len(runs)))
    result = {}
    for name in runs[0]["measures"]:
        values = np.array([run["measures"][name] for run in runs])
        statistic = float(scipy.stats.spearmanr(values, accuracy).statistic)
        resampled = [scipy.stats.spearmanr(values[d], accuracy[d]).statistic for d in draws]
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        result[name] = {"spearman": statistic, "interval_95": [float(low), float(high)]}
    return result


if __name__ == "__main__":
    main()
