"""The examples of statistical physics: small runs, and the law that the sampler must follow."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import binary_perceptron as binary_recorder
from benchmarks import gaussian_mixture as mixture_recorder
from benchmarks import perceptron as recorder
from benchmarks.compare import training
from examples import (
    belief_propagation,
    binary_perceptron,
    entropy_sgld,
    gaussian_mixture,
    perceptron,
)

ROOT = Path(__file__).parent.parent


def test_samplers_follow_the_integrated_law():
    results = {}
    for name, (tx, potential) in entropy_sgld.samplers().items():
        sampled = entropy_sgld.walk(tx, walkers=1000, steps=800)
        expected = results[name] = entropy_sgld.exact(potential)
        # Finite steps and inner loops of finite length leave a bias of this size.
        assert abs(sampled.mean - expected.mean) < 0.05
        assert abs(sampled.std - expected.std) < 0.03
        assert abs(sampled.narrow - expected.narrow) < 0.03
    # The laws differ: the second is the first, blurred by the spring.
    plain, entropic = results.values()
    blurred = plain.std**2 + entropy_sgld.TEMPERATURE / entropy_sgld.GAMMA
    np.testing.assert_allclose(entropic.std**2, blurred, rtol=1e-3)
    np.testing.assert_allclose(entropic.mean, plain.mean, atol=1e-4)


def test_sgld_command(capsys):
    assert entropy_sgld.main(["--walkers", "10", "--steps", "8"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_perceptron_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perceptron, "DRAWS", 3)
    monkeypatch.setattr(perceptron, "TEST_SIZE", 20)
    arguments = ["--seeds", "2", "--evaluations", "40", "--machines", "perceptron"]
    where = ["--out", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", ["perceptron", *arguments, *where])
    recorder.main()
    results = json.loads((tmp_path / "p.json").read_text())
    assert [(a["method"], a["loss"]) for a in results["arms"]] == perceptron.ARMS
    for arm in results["arms"]:
        assert arm["gradient_evaluations_per_seed"] == 40
        assert np.array(arm["local_energy"]).shape == (2, len(perceptron.SIGMAS))
        np.testing.assert_allclose(np.array(arm["local_energy"])[:, 0], 0, atol=1e-6)
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.02
    assert capsys.readouterr().out.count("| perceptron |") == 4


@pytest.mark.parametrize("name", sorted(perceptron.METHODS))
def test_methods_cost_what_they_say(name):
    method = perceptron.METHODS[name]
    assert training.count_gradients(method.build(5), 5) == 5 * method.evaluations


def test_binary_perceptron_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(binary_perceptron, "DRAWS", 5)
    monkeypatch.setattr(belief_propagation, "ITERATIONS", 5)
    arguments = ["--seeds", "2", "--evaluations", "4200", "--inputs", "51"]
    where = ["--out", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", ["binary_perceptron", *arguments, *where])
    binary_recorder.main()
    arms = {arm["method"]: arm for arm in json.loads((tmp_path / "p.json").read_text())["arms"]}
    assert list(arms) == list(binary_perceptron.METHODS)
    # Messages find signs that satisfy every pattern, and bear more flips than training's.
    plain, focused = arms["sgd"], arms["focusing_bp"]
    assert focused["train_errors"] == [0.0, 0.0]
    assert np.mean(focused["margin"]) > np.mean(plain["margin"])
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.02
    assert capsys.readouterr().out.count("focusing_bp") == 1


def test_messages_of_a_pattern_are_those_of_the_exact_count():
    # With the magnetisations of the others at +-1 but for one weight, up or down is a matter of
    # one sum: the pattern asks for its own sign as soon as the others leave the sum at zero.
    patterns = np.array([[1.0, -1.0, 1.0]])
    told = belief_propagation.pattern_messages(patterns, np.zeros((1, 3)))
    # P(sum of two free signs + s > 0) by the normal law of variance 2, with s = +-1.
    up = 0.5 * (1 + math.erf(1 / 2))
    np.testing.assert_allclose(told, patterns * np.log(up / (1 - up)) / 2, rtol=1e-5)


def test_focusing_has_its_known_limits():
    field = np.linspace(-1.0, 1.0, 5)
    for y in (1.0, 3.0):
        # Bound without slack, the y - 1 others say what the field says, each once.
        told = belief_propagation.focusing_message(field, np.float32(1.0), y)
        np.testing.assert_allclose(told, (y - 1) * field, atol=1e-5)
    np.testing.assert_allclose(belief_propagation.focusing_message(field, 0.0, 3.0), 0.0)


def test_flips_of_focused_signs_cost_least_in_the_committed_results():
    arms = json.loads((ROOT / "benchmarks/results/binary_perceptron.json").read_text())["arms"]
    energy = {arm["method"]: np.array(arm["flip_energy"])[:, 1:] for arm in arms}
    assert energy["sgd"].shape == (8, 3)
    # In the mean at all three distances, seed by seed at the larger two.
    assert (energy["focusing_bp"].mean(0) < energy["sgd"].mean(0)).all()
    assert (energy["focusing_bp"] < energy["sgd"])[:, 1:].all()


def test_gaussian_mixture_command(tmp_path, monkeypatch, capsys):
    where = ["--seeds", "2", "--evaluations", "200", "--json", str(tmp_path / "g.json")]
    monkeypatch.setattr(sys, "argv", ["gaussian_mixture", *where])
    mixture_recorder.main()
    arms = json.loads((tmp_path / "g.json").read_text())["arms"]
    assert [(a["method"], a["loss"]) for a in arms[:-1]] == gaussian_mixture.ARMS
    # Nothing beats the closed form in the mean.
    best = np.mean(arms[-1]["angle"])
    assert all(np.mean(arm["angle"]) > best for arm in arms[:-1])
    assert "mean of y x" in capsys.readouterr().out


def test_the_closed_form_is_the_error_on_new_inputs():
    problem, v = gaussian_mixture.make_problem(jax.random.key(0))
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], size=20_000)
    x = gaussian_mixture.CENTRE * y[:, None] * np.asarray(v) + rng.normal(size=(len(y), len(v)))
    w = np.asarray(v) + 0.1 * np.asarray(problem.params[0])
    counted = np.mean((x @ w) * y <= 0)
    told = gaussian_mixture.score(problem, v, jnp.asarray(w[None])).test_errors
    np.testing.assert_allclose(counted, told, atol=0.01)


def test_replicas_come_nearer_than_sgd_in_the_committed_results():
    arms = json.loads((ROOT / "benchmarks/results/gaussian_mixture.json").read_text())["arms"]
    angles = {(arm["method"], arm["loss"]): np.array(arm["angle"]) for arm in arms}
    assert (angles["replicated_sgd", "hinge"] < angles["sgd", "hinge"]).all()
