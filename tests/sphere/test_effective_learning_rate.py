"""The effective learning rate, recorded."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt


def _recorded(state):
    return optax.tree.get(state, "effective_learning_rate")


def test_it_is_the_learning_rate_over_the_squared_norm():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.1})
    tx = flatopt.record_effective_learning_rate(schedule, "leaf")
    state = tx.init(params)
    assert _recorded(state) == (0.0, 0.0)
    for rate in (0.5, 0.05):
        updates, state = tx.update(params, state, params)
        assert updates is params
        np.testing.assert_allclose(_recorded(state), (rate / 25, rate), rtol=1e-6)


def test_decay_shortens_the_weights_and_quickens_them():
    """What a fixed effective learning rate takes away: SGD's own rises as the decay acts."""
    rate, w = 0.1, jnp.array([3.0, 4.0])
    tx = optax.chain(
        flatopt.record_effective_learning_rate(rate),
        optax.add_decayed_weights(0.5),
        optax.sgd(rate),
    )
    state, seen = tx.init(w), []
    for _ in range(3):
        updates, state = tx.update(jnp.zeros(2), state, w)
        w = w + updates
        seen.append(float(_recorded(state)[0]))
    np.testing.assert_allclose(seen, [0.1 / 25 / 0.95 ** (2 * i) for i in range(3)], rtol=1e-5)


def test_on_the_sphere_it_stays():
    rate, w = 0.1, jnp.array([3.0, 4.0])
    tx, recorder = flatopt.fixed_elr(rate), flatopt.record_effective_learning_rate(rate * 25)
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(jnp.array([0.8, -0.6]), state, w)
        w = w + updates
        _, recorded = recorder.update(w, recorder.init(w), w)
        np.testing.assert_allclose(_recorded(recorded)[0], rate, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_weights_of_no_length_have_an_infinite_one(size):
    w = jnp.full(4, size / 2)
    tx = flatopt.record_effective_learning_rate(0.5)
    value = _recorded(tx.update(w, tx.init(w), w)[1])[0]
    assert not jnp.isnan(value)
    assert value == (jnp.inf if size < 1 else 0.0)  # 0.5 / size^2 is beyond float32.
