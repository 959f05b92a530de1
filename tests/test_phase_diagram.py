"""The phase diagram: a small run, and what is claimed of the committed one."""

import argparse
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import record
from examples import digits, phase_diagram


@pytest.fixture
def results():
    return json.loads((record.RESULTS / "phase_diagram.json").read_text())


def test_units_that_are_not_there_stay_away():
    """What lets all widths share a program."""
    unit = (jnp.arange(8) < 3).astype(jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        params = phase_diagram.start(jax.random.key(0), unit)
    (x, labels), _ = digits.load(40)
    args = argparse.Namespace(steps=5, rate=0.1)
    train_set = (x.reshape(40, -1), labels)
    with jax.numpy_rank_promotion("allow"):
        trained = phase_diagram.train(params, jnp.float32(16), jax.random.key(1), train_set, args)
    away = unit == 0
    for number, axis in ((0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)):
        assert not np.compress(away, trained[number], axis=axis).any()
    moved = [np.abs(new - old).max() for new, old in zip(trained, params, strict=True)]
    assert min(moved) > 0


def test_networks_of_one_output_have_no_likeness():
    x = jax.random.normal(jax.random.key(0), (20, 64))
    with jax.numpy_rank_promotion("allow"):
        params = phase_diagram.start(jax.random.key(1), jnp.ones(4))
        constant = [*params[:4], jnp.zeros_like(params[4]), jnp.ones(10)]
        assert np.isnan(phase_diagram.alike(params, constant, x))
        np.testing.assert_allclose(phase_diagram.alike(params, params, x), 1.0, rtol=1e-5)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phase_diagram, "WIDTHS", (1, 8))
    monkeypatch.setattr(phase_diagram, "BATCH_SIZES", (16, 4))
    flags = ["--steps=20", "--curve-steps=5", "--train-size=60", "--out", str(tmp_path / "p.png")]
    with jax.numpy_rank_promotion("allow"):
        assert phase_diagram.main(flags) == 0
    assert "| connected, " in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "p.png").shape[2] >= 3


def test_the_best_phase_is_connected_flat_and_similar(results):
    accuracy, names = phase_diagram.means(results)["test_accuracy"], phase_diagram.phases(results)
    assert accuracy.shape == (6, 6)
    of = {name: accuracy[names == name].mean() for name in set(names.ravel())}
    assert max(of, key=of.get) == "connected, flat, similar"
    # Flat alone is no merit: what has learnt nothing is flat too.
    assert min(of, key=of.get) == "connected, flat, dissimilar"


def test_likeness_orders_the_cells_best_and_the_training_loss_worst(results):
    ranks = {name: abs(rank) for name, rank in phase_diagram.correlations(results).items()}
    assert sorted(ranks, key=ranks.get) == ["train_loss", "connectivity", "sharpness", "cka"]
    found = phase_diagram.means(results)
    for width in range(3, 6):  # Cold runs fit the wrong labels.
        assert found["train_loss"][width].argmin() == 0
        assert found["test_accuracy"][width].argmin() == 0


def test_it_runs_in_minutes(results):
    assert results["seconds"] < 300
