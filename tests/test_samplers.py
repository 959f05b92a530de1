"""The batches of persistent SGD follow their stated law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import samplers

PAIRS = [(0.25, 20.0), (0.1, 10.0), (0.5, 4.0), (0.8, 100.0)]


def _run(sampler: samplers.PersistentSampler, steps: int, seed: int = 0) -> np.ndarray:
    def step(state, _):
        return sampler.next(state), state.active

    return np.asarray(jax.lax.scan(step, sampler.init(seed), length=steps)[1])


@pytest.mark.parametrize(("fraction", "persistence"), PAIRS)
def test_stationary_fraction(fraction: float, persistence: float):
    """At every time, first and last included: the first batch comes from the stationary law."""
    active = _run(samplers.persistent_sampler(20_000, fraction, persistence), 50)
    error = np.sqrt(fraction * (1 - fraction) / 20_000)
    assert np.abs(active.mean(1) - fraction).max() < 5 * error
    assert np.abs(active.mean(1) - fraction).max() > 0  # It is a law, not a fixed number.


@pytest.mark.parametrize(("fraction", "persistence"), PAIRS)
def test_correlation_in_time(fraction: float, persistence: float):
    active = _run(samplers.persistent_sampler(20_000, fraction, persistence), 30).astype(float)
    centred = (active - fraction) / np.sqrt(fraction * (1 - fraction))
    for lag in (1, 2, 5):
        expected = (1 - 1 / (fraction * persistence)) ** lag
        # 20,000 independent samples; times are correlated, so they are not counted.
        found = (centred[lag:] * centred[:-lag]).mean()
        assert abs(found - expected) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize(("fraction", "persistence"), PAIRS)
def test_probabilities_of_entering_and_leaving(fraction: float, persistence: float):
    active = _run(samplers.persistent_sampler(20_000, fraction, persistence), 30)
    now, later = active[:-1], active[1:]
    enter, leave = later[~now].mean(), 1 - later[now].mean()
    leaving = (1 - fraction) / (fraction * persistence)
    for found, expected, trials in (
        (enter, 1 / persistence, (~now).sum()),
        (leave, leaving, now.sum()),
    ):
        assert abs(found - expected) < 5 * np.sqrt(max(expected * (1 - expected), 1e-9) / trials)


def test_tau_of_one_over_b_draws_fresh_batches():
    active = _run(samplers.persistent_sampler(50_000, 0.2, 5.0), 2).astype(float)
    correlation = np.corrcoef(active)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(50_000)


def test_fraction_one_is_the_whole_set():
    active = _run(samplers.persistent_sampler(50, 1.0, 3.0), 20)
    assert active.all()


def test_weights_estimate_the_mean():
    sampler = samplers.persistent_sampler(1000, 0.1, 30.0)
    states = [sampler.init(seed) for seed in range(200)]
    losses = jnp.arange(1000.0)
    estimates = np.array([jnp.sum(sampler.weights(s) * losses) for s in states])
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert abs(estimates.mean() - 499.5) < 4 * error
    for state in states[:5]:
        weights = sampler.weights(state, normalise=True)
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-5)
        np.testing.assert_array_equal(weights > 0, state.active)
    empty = states[0]._replace(active=jnp.zeros(1000, bool))
    assert jnp.sum(sampler.weights(empty, normalise=True)) == 0


def test_seeds_and_jit():
    sampler = samplers.persistent_sampler(100, 0.5, 4.0)
    first = sampler.init(3)
    np.testing.assert_array_equal(first.active, sampler.init(jax.random.key(3)).active)
    assert not np.array_equal(first.active, sampler.init(4).active)
    eager, jitted = sampler.next(first), jax.jit(sampler.next)(first)
    np.testing.assert_array_equal(eager.active, jitted.active)
    np.testing.assert_array_equal(eager.key, jitted.key)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.5, 4.0), "num_samples=0"),
        ((10, 0.0, 4.0), "fraction=0"),
        ((10, 1.5, 4.0), "fraction=1.5"),
        ((10, 0.1, 8.0), "at least 9 steps"),
        ((10, 0.9, 0.5), "at least 1 steps"),
        ((10, 0.9, float("nan")), "persistence=nan"),
    ],
)
def test_out_of_range(arguments, words: str):
    with pytest.raises(ValueError, match=words):
        samplers.persistent_sampler(*arguments)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_generator(generator: str):
    sampler = samplers.persistent_sampler(1000, 0.25, 4.0)
    state = sampler.init(jax.random.key(1, impl=generator))
    later = jax.jit(sampler.next)(state)
    assert later.key.dtype == jnp.uint32
    assert later.key.shape == state.key.shape
    assert 150 < int(later.active.sum()) < 350
    assert not np.array_equal(later.active, state.active)
