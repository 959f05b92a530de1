"""Functional SAM."""

import jax
import jax.numpy as jnp
import numpy as np

import flatopt
from tests import cases


def test_functional_sam_ignores_the_curvature_of_the_head():
    """A linear network has none of its own: the functional gradient is the clean one."""
    x = jax.random.normal(jax.random.key(0), (8, 3))
    y = jax.random.normal(jax.random.key(1), (8,))
    params = jnp.array([1.0, -2.0, 0.5])

    def head(outputs, y):
        return jnp.mean(jnp.exp(outputs - y))

    loss, grads, grad_fn = flatopt.functional_value_and_grad(lambda w, x: x @ w, head, params, x, y)
    np.testing.assert_allclose(loss, head(x @ params, y), rtol=1e-6)
    np.testing.assert_allclose(grad_fn(params + 1.0, 0), grads, rtol=1e-5)
    plain = flatopt.make_grad_fn(lambda w: head(x @ w, y))
    assert not np.allclose(plain(params + 1.0), grads, rtol=1e-2)


def test_functional_sam_is_sam_for_a_linear_head():
    params, (x, _) = cases.init_params(), cases.make_batch()

    def network(params, x):
        return jnp.tanh(x @ params["hidden"]["kernel"])

    _, grads, grad_fn = flatopt.functional_value_and_grad(network, jnp.sum, params, x)
    plain = flatopt.make_grad_fn(lambda params: jnp.sum(network(params, x)))
    cases.assert_close(grads, plain(params))
    away = jax.tree.map(lambda p: p + 0.1, params)
    cases.assert_close(jax.jit(lambda g, p: g(p, 0))(grad_fn, away), plain(away))
