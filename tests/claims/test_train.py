"""Training of many settings and seeds in one program."""

import jax
import numpy as np
import optax
import pytest

import flatopt
from benchmarks.claims.tasks import TASKS
from benchmarks.claims.train import Arm, draw_rows, train

SMALL = {"examples": 40, "valid_examples": 20, "width": 8, "batch_size": 16}


def _make(hypers, steps):
    rate = optax.cosine_decay_schedule(1.0, steps)
    base = optax.chain(
        optax.trace(0.9), optax.scale_by_schedule(rate), optax.scale(-hypers["learning_rate"])
    )
    return optax.chain(flatopt.sam(hypers["rho"]), base)


SAM = Arm("sam", _make, 2, {"learning_rate": (0.01, 0.1), "rho": (0.05, 0.2)})
HYPERS = {"learning_rate": np.array([0.01, 0.1, 0.1]), "rho": np.array([0.05, 0.05, 0.2])}


@pytest.mark.parametrize("name", ["digits_mlp", "digits_mlp_bn"])
def test_settings_and_seeds_do_not_touch_each_other(name):
    task = TASKS[name](None, **SMALL)
    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks.
        all_ = train(task, SAM, HYPERS, [3, 4], 20, points=2, at_once=2)
        own = {key: values[2:] for key, values in HYPERS.items()}
        one = train(task, SAM, own, [4], 20, points=2)
    assert all_.curve.shape == (3, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(all_))
    for many, single in zip(jax.tree.leaves(all_[:2]), jax.tree.leaves(one[:2]), strict=True):
        np.testing.assert_allclose(many[2, 1], single[0, 0], rtol=1e-3, atol=1e-4)
        assert np.abs(many[1, 1] - many[2, 1]).max() > 1e-4  # The radius was heard.


def test_an_epoch_takes_each_row_at_most_once():
    rows = draw_rows(40, 16, 5, seed=0)
    assert rows.shape == (5, 16)
    for epoch in (rows[:2], rows[2:4]):
        assert len(np.unique(epoch)) == 32


def test_points_divide_steps():
    with pytest.raises(ValueError, match="must divide"):
        train(TASKS["digits_mlp"](None, **SMALL), SAM, HYPERS, [0], 5, points=2)
