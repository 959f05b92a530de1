"""Learning rate and momentum from the spectrum of the Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from flatopt.measures._lanczos_rates import authors, normalised, polyak, smallest_outside_spike

CURVATURES = jnp.array([9.0, 4.0, 1.0, 2.0])


def _bowl(w):
    return 0.5 * CURVATURES @ w**2


@pytest.mark.parametrize(
    ("rule", "learning_rate", "momentum"),
    [
        ("polyak", (2 / (3 + 1)) ** 2, (2 / 4) ** 2),
        ("authors", (2 / (3 + 1)) ** 2, (2 / 4) ** 2),  # The missing root of 1 is 1.
        ("normalised", 1 / 3, 2 / 4),
        ("median", 2 / (9 + 3), None),
    ],
)
def test_each_rule_on_four_known_eigenvalues(rule, learning_rate, momentum):
    found = measures.lanczos_rates(_bowl, jnp.ones(4), num_steps=4, rule=rule)
    np.testing.assert_allclose(np.sort(found.curvatures), [1, 2, 4, 9], rtol=1e-4)
    np.testing.assert_allclose(found.learning_rate, learning_rate, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(found.weights), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.largest, 9.0, rtol=1e-5)
    if momentum is None:
        assert found.momentum is None
    else:
        np.testing.assert_allclose(found.momentum, momentum, rtol=1e-4)


def test_polyaks_rates_turn_both_ends_by_the_same_factor():
    """The fastest heavy ball: at both ends its iteration has modulus sqrt(momentum)."""
    high, low = jnp.float32(9.0), jnp.float32(0.5)
    rate, momentum = (float(x) for x in polyak(high, low))
    for curvature in (9.0, 3.0, 0.5):
        turn = np.array([[1 + momentum - rate * curvature, -momentum], [1.0, 0.0]])
        radius = np.abs(np.linalg.eigvals(turn)).max()
        np.testing.assert_allclose(radius, momentum**0.5, rtol=2e-3)
    # The committed program has another momentum: slower, and not even in units that agree.
    assert abs(float(authors(high, low)[1]) - momentum) > 0.01
    scaled = authors(100 * high, 100 * low)[1], polyak(100 * high, 100 * low)[1]
    assert abs(float(scaled[0]) - float(authors(high, low)[1])) > 0.1
    np.testing.assert_allclose(scaled[1], momentum, rtol=1e-5)
    np.testing.assert_allclose(normalised(100 * high, 100 * low), normalised(high, low), rtol=1e-5)


def test_the_spike_at_zero_is_left_out():
    values, spike = jnp.array([5.0, 0.01, 1.0]), jnp.array([0.1, 0.8, 0.1])
    assert smallest_outside_spike(values, spike) == 1.0
    assert smallest_outside_spike(values, jnp.array([0.3, 0.4, 0.3])) == jnp.float32(0.01)
    assert smallest_outside_spike(jnp.array([2.0]), jnp.array([1.0])) == 2.0  # There is no other.


def test_negative_curvatures_count_by_their_size():
    loss = lambda w: 0.5 * (4 * w[0] ** 2 - 9 * w[1] ** 2)  # noqa: E731
    found = measures.lanczos_rates(loss, jnp.ones(2), num_steps=2, mu="median", key=3)
    np.testing.assert_allclose(np.sort(found.curvatures), [4, 9], rtol=1e-4)
    np.testing.assert_allclose(found.largest, 4.0, rtol=1e-4)


def test_it_is_that_of_the_mean_over_batches_and_of_the_chosen_leaves():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
    loss = lambda params, batch: 0.5 * jnp.mean((batch @ params["w"] + params["b"]) ** 2)  # noqa: E731
    params = {"w": jnp.ones(4), "b": jnp.ones([])}
    mask = {"w": True, "b": False}
    found = measures.lanczos_rates(loss, params, x, num_steps=4, mask=mask, key=jax.random.key(1))
    flat = np.asarray(x).reshape(-1, 4)
    top = np.linalg.eigvalsh(flat.T @ flat / 30)
    np.testing.assert_allclose(np.sort(found.curvatures), top, rtol=1e-3)
    by_list = measures.lanczos_rates(loss, params, list(x), num_steps=4, mask=mask, key=1)
    np.testing.assert_allclose(by_list.learning_rate, found.learning_rate, rtol=1e-3)


def test_steps_beyond_the_dimension_are_not_taken():
    assert measures.lanczos_rates(_bowl, jnp.ones(4), num_steps=20).curvatures.shape == (4,)


def test_a_flat_loss_has_no_rate_and_nan_shows():
    flat = measures.lanczos_rates(lambda w: jnp.sum(w), jnp.ones(4), num_steps=2)
    assert not jnp.isfinite(flat.learning_rate)
    assert flat.largest == 0
    loss = lambda w: jnp.sum(w**1.5)  # noqa: E731
    bad = measures.lanczos_rates(loss, jnp.array([0.0, 1.0]), num_steps=2)
    assert jnp.isnan(bad.learning_rate)
    assert jnp.isnan(bad.largest)


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="num_steps=0 is out of range"):
        measures.lanczos_rates(_bowl, jnp.ones(4), num_steps=0)
    with pytest.raises(ValueError, match="rule='newton' must be one of"):
        measures.lanczos_rates(_bowl, jnp.ones(4), rule="newton")
    with pytest.raises(ValueError, match="mu='mean' must be one of"):
        measures.lanczos_rates(_bowl, jnp.ones(4), mu="mean")
