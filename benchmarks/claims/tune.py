"""Every arm tuned alike: the same number of settings, judged on validation, tested once."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.task import Task
from benchmarks.claims.train import Arm, Trained, train


class Tuned(NamedTuple):
    """What tuning chose, and what it gave.

    Attributes:
      setting: the chosen hyperparameters.
      valid: mean validation metric of each tried setting; minus infinity where it is not finite.
      test: test metric of each test seed, with the chosen setting.
      steps: updates of a run.
      gradients: gradient evaluations of a run.
    """

    setting: dict[str, float]
    valid: np.ndarray
    test: np.ndarray
    steps: int
    gradients: int


def settings_of(arm: Arm, tries: int) -> dict[str, np.ndarray]:
    """The arm's grid, every combination.

    Raises:
      ValueError: if they are not `tries`: arms are compared at equal budgets of tuning.
    """
    combinations = list(itertools.product(*arm.grid.values()))
    if len(combinations) != tries:
        raise ValueError(
            f"grid of {arm.name!r} has {len(combinations)} settings and must have tries={tries}, "
            "as every arm's"
        )
    return dict(zip(arm.grid, np.array(combinations).T, strict=True))


def tune(
    task: Task,
    arm: Arm,
    gradients: int,
    tries: int,
    tune_seeds: Sequence[int],
    test_seeds: Sequence[int],
    at_once: int | None = None,
) -> Tuned:
    """Chooses on `tune_seeds` by validation; trains anew on `test_seeds`, and tests.

    Args:
      task: the network and its data.
      arm: how to train.
      gradients: what a run may evaluate; an arm of two gradients an update takes half the updates.
      tries: number of settings, the same for every arm.
      tune_seeds, test_seeds: disjoint.
      at_once: settings in memory at a time.
    """
    if set(tune_seeds) & set(test_seeds):
        raise ValueError(f"tune_seeds={tune_seeds} and test_seeds={test_seeds} must be disjoint")
    settings, steps = settings_of(arm, tries), gradients // arm.grads_per_step
    curve = np.asarray(train(task, arm, settings, tune_seeds, steps, at_once=at_once).curve)
    mean = curve[:, :, -1].mean(1)
    valid = np.where(np.isfinite(mean), mean, -np.inf)
    best = {name: values[valid.argmax()] for name, values in settings.items()}
    one = {name: np.array([value]) for name, value in best.items()}
    trained = train(task, arm, one, test_seeds, steps)
    test = _test(task, trained, test_seeds[0])
    chosen = {name: float(value) for name, value in best.items()}
    return Tuned(chosen, valid, test, steps, steps * arm.grads_per_step)


def _test(task: Task, trained: Trained, seed: int) -> np.ndarray:
    """The test metric of each network of the only setting."""
    part = task.draw(seed).test  # The same for all seeds.

    def of_network(params: Any, stats: Any) -> jax.Array:
        return task.metric(
            task.apply(params, stats, part.inputs, False)[0], jnp.asarray(part.targets)
        )

    first = jax.tree.map(lambda leaf: leaf[0], trained[:2])
    return np.asarray(jax.jit(jax.vmap(of_network))(*first))
