"""Tuning alike."""

import jax
import numpy as np
import pytest

from benchmarks.claims.tasks import TASKS
from benchmarks.claims.tune import settings_of, tune
from tests.claims.test_train import SAM, SMALL


def test_the_best_on_validation_is_chosen_and_tested():
    task = TASKS["digits_mlp"](None, **SMALL)
    arm = SAM._replace(grid={"learning_rate": (1e-6, 0.1), "rho": (0.05, 0.1)})
    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks.
        found = tune(task, arm, 100, 4, [100], [0, 1])
    assert (found.steps, found.gradients) == (50, 100)
    assert found.setting["learning_rate"] == 0.1
    assert found.valid.shape == (4,)
    assert found.test.shape == (2,)
    assert found.test.min() > 0.2  # A tenth is chance.


def test_settings_are_all_combinations():
    found = settings_of(SAM, 4)
    np.testing.assert_array_equal(found["learning_rate"], [0.01, 0.01, 0.1, 0.1])
    np.testing.assert_array_equal(found["rho"], [0.05, 0.2, 0.05, 0.2])


def test_budgets_are_equal_and_seeds_disjoint():
    with pytest.raises(ValueError, match="must have tries=9"):
        settings_of(SAM, 9)
    with pytest.raises(ValueError, match="disjoint"):
        tune(TASKS["digits_mlp"](None, **SMALL), SAM, 10, 4, [0], [0, 1])
