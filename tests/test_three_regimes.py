"""The example of the sphere: a small run, and what is claimed of the committed one."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import record
from examples import digits, three_regimes


@pytest.fixture
def results():
    return json.loads((record.RESULTS / "three_regimes.json").read_text())


def test_the_network_is_scale_invariant_but_in_its_last_layer():
    (x, labels), _ = digits.load(50)
    x, (params, head) = x.reshape(50, -1), three_regimes.start(jax.random.key(0))
    params = jax.tree.map(lambda w: 10 * w, params)  # Where the layer's epsilon does not show.
    value = three_regimes.loss(params, head, x, labels)
    for name in params:
        longer = params | {name: 3 * params[name]}
        np.testing.assert_allclose(three_regimes.loss(longer, head, x, labels), value, rtol=1e-2)
    assert abs(three_regimes.loss(params, 3 * head, x, labels) - value) > 0.1 * value


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(three_regimes, "RATES", np.array([1e-2, 1.0]))
    monkeypatch.setattr(three_regimes, "SHOWN", (0, 1))
    flags = ["--seeds", "2", "--steps", "40", "--windows", "4", "--out", str(tmp_path / "p.png")]
    with jax.numpy_rank_promotion("allow"):
        assert three_regimes.main(flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2
    assert matplotlib.image.imread(tmp_path / "p.png").shape[2] >= 3


def test_there_are_three_regimes(results):
    """Loss falls with the rate; one rate holds it level and above; the largest are chance."""
    rates, level = np.array(results["rates"]), three_regimes.level(results).mean(1)
    curves, accuracy = np.array(results["loss"]).mean(1), np.array(results["test_accuracy"]).mean(1)
    assert len(rates) == 13
    assert len(results["seeds"]) == 4
    converging = rates < 0.012
    assert (np.diff(level[converging]) < 0).all()
    # Among the rates beyond, one whose loss of the second half is that of the quarter before it.
    quarter = curves.shape[1] // 4
    middle, late = curves[:, quarter : 2 * quarter].mean(1), curves[:, 2 * quarter :].mean(1)
    is_level = np.abs(late / middle - 1) < 0.1
    between = (level > 10 * level[converging].min()) & (level < 1.0)
    assert (is_level & between).any()
    assert (accuracy[between & is_level] > 0.7).all()
    large = rates > 0.09
    assert (level[large] > np.log(10)).all()
    assert (accuracy[large] < 0.4).all()
    assert accuracy[-1] < 0.2


def test_errors_of_scale_invariance_are_those_of_the_layers_epsilon(results):
    errors = np.array(results["error"])[np.array(results["rates"]) > 0.09]
    assert (errors < 1e-2).all()
    assert jnp.isfinite(errors).all()
