"""Shallow networks with a PAC-Bayes bound: the authors' numbers, and draws that must agree."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import pac_bayes_shallow as shallow
from flatopt import measures
from tests.replay import Golden, replays


def _newton(q, c):
    """The authors' inverse: six steps from Pinsker's bound, and 1 where they leave [0, 1]."""
    p = np.minimum(q + np.sqrt(c / 2), 0.999)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for _ in range(6):
            excess = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)) - c
            p = p - excess / ((1 - q) / (1 - p) - q / p)
    return np.nan_to_num(p, nan=1.0)


def _assert_like_both(q, c, official, exact):
    np.testing.assert_allclose(_newton(q, c), official, rtol=1e-9)
    np.testing.assert_allclose(measures.kl_inverse(q, c), exact, rtol=1e-9)


@replays("pac_bayes_shallow")
def test_replays(golden: Golden):
    arrays = golden.arrays
    q, kl, m = (arrays[name] for name in ("loss", "kl", "m"))
    _assert_like_both(
        q[:, None], arrays["rhs"][None], arrays["inverse_kl"], arrays["inverse_kl_exact"]
    )
    grid = np.broadcast_arrays(q[:, None, None], kl[None, :, None], m[None, None])
    c = (grid[1] + np.log(2 * np.sqrt(grid[2]) / 0.025)) / grid[2]
    _assert_like_both(grid[0], c, arrays["seeger"], arrays["seeger_exact"])
    ours = measures.seeger_bound(*grid, 0.025)
    np.testing.assert_allclose(ours, arrays["seeger_exact"], rtol=1e-9)
    for number, case in enumerate(json.loads(str(arrays["meta"]))["cases"]):
        _assert_case(case, golden.tree(f"case{number}"))


def _assert_case(case, recorded):
    twin, beta = shallow.TWINS[case["activation"]], case["beta"]
    network = shallow.Network(jnp.asarray(recorded["u"]), jnp.asarray(recorded["v"]))
    prior = shallow.Network(jnp.asarray(recorded["u0"]), jnp.asarray(recorded["v0"]))
    x = jnp.asarray(recorded["X"])
    # The official GELU network is beta times the mean of its random one, and the official draws
    # are on inputs that have not been normalised: neither changes a class.
    is_gelu = case["activation"] == "gelu"
    mean = shallow.predict(twin, network, x, beta)
    np.testing.assert_allclose((beta if is_gelu else 1) * mean, recorded["predict"], rtol=1e-9)
    sigmas = case["sigma_1"], case["sigma_2"]
    found = shallow.complexity(twin, network, prior, beta, *sigmas)
    np.testing.assert_allclose(found, recorded["complexity"], rtol=1e-9)
    length = jnp.linalg.norm(x, axis=1, keepdims=True) if is_gelu else 1
    deviation = (recorded["stochastic_mean"] - length * mean) / recorded["stochastic_se"]
    assert np.abs(deviation).max() < 5
    assert np.sqrt(np.mean(deviation**2)) < 2


@pytest.mark.parametrize("name", sorted(shallow.TWINS))
def test_the_network_is_the_mean_of_the_random_one(name):
    twin, keys = shallow.TWINS[name], jax.random.split(jax.random.key(0), 4)
    u, v = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (3, 6))
    network, x = shallow.Network(u, v), jax.random.normal(keys[2], (5, 4))
    draws = jax.vmap(lambda k: shallow.sample(twin, network, x, 2.0, 0.3, 0.1, k))(
        jax.random.split(keys[3], 20_000)
    )
    error = draws.std(axis=0) / np.sqrt(len(draws))
    np.testing.assert_array_less(
        jnp.abs(draws.mean(axis=0) - shallow.predict(twin, network, x, 2.0)), 4.5 * error
    )


def test_the_complexity_is_that_of_gaussians_with_the_noise_that_is_drawn():
    """Of two Gaussians with the same variances: half the squared distance over the variance."""
    network = shallow.Network(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
    prior = shallow.Network(jnp.array([[1.5, 2.0]]), jnp.array([[2.0]]))
    beta, s1, s2 = 4.0, 0.2, 0.5
    for name, precisions in (("erf", 2 * beta**2), ("gelu", beta**2 + 1 / s1**2)):
        found = shallow.complexity(shallow.TWINS[name], network, prior, beta, s1, s2)
        np.testing.assert_allclose(found, [precisions * 0.25 / 2, 1 / (2 * s2**2)], rtol=1e-6)


def test_the_bound_is_below_chance_and_above_the_errors_on_new_digits(capsys):
    shallow.main(["--width", "30", "--steps", "600"])
    values = [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("  ")]  # fmt: skip
    assert len(values) == 10
    for bound, _, random, majority, mean in (values[:5], values[5:]):
        assert random < bound
        assert max(majority, mean) < 2 * bound < 0.9
