"""Whether a loss minds the length of the weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures


def _loss(params, batch):
    x, y = batch
    hidden = x @ params["kernel"]
    hidden = hidden - jnp.mean(hidden, axis=0, keepdims=True)
    hidden = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=0, keepdims=True))
    return jnp.mean((jnp.tanh(hidden) @ params["head"] - y) ** 2)


def _problem():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "head": rng.normal(size=(4,))}
    params = {name: jnp.asarray(w, jnp.float32) for name, w in params.items()}
    x, y = rng.normal(size=(2, 10, 3)), rng.normal(size=(2, 10))
    return params, (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def test_a_kernel_before_a_normalisation_is_invariant_and_the_last_layer_is_not():
    params, batches = _problem()
    kernel, head = (
        measures.scale_invariance_error(
            _loss, params, batches, mask={"kernel": own == "kernel", "head": own == "head"}
        )
        for own in ("kernel", "head")
    )
    assert kernel < 1e-6
    assert 0.05 < head <= 1
    assert 1e-3 < measures.scale_invariance_error(_loss, params, batches) < head


def test_it_is_the_cosine_of_weights_and_gradient():
    w = jnp.array([1.0, 2.0])
    found = measures.scale_invariance_error(lambda w: 3.0 * w[0] - w[1], w)
    np.testing.assert_allclose(found, 1 / np.sqrt(5 * 10), rtol=1e-6)
    np.testing.assert_allclose(measures.scale_invariance_error(lambda w: -w @ w, w), 1.0, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_weights_and_gradients_of_every_size(size):
    w = size * jnp.array([1.0, 2.0])
    found = measures.scale_invariance_error(lambda w: (3.0 * w[0] - w[1]) / size**0.5, w)
    np.testing.assert_allclose(found, 1 / np.sqrt(50), rtol=1e-5)


def test_without_weights_or_gradient_it_is_zero_and_nan_shows():
    assert measures.scale_invariance_error(lambda w: 0.0 * w[0], jnp.ones(2)) == 0
    assert measures.scale_invariance_error(lambda w: w[0], jnp.zeros(2)) == 0
    bad = measures.scale_invariance_error(lambda w: jnp.sqrt(w[0]) + w[1], jnp.array([0.0, 1.0]))
    assert jnp.isnan(bad)
