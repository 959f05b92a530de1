"""The examples of statistical physics: small runs, and the law that the sampler must follow."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest

from benchmarks import perceptron as recorder
from benchmarks.compare import training
from examples import entropy_sgld, perceptron


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
