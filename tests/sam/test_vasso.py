"""VaSSO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.vasso(RHO, decay=0.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_the_direction_varies_less_than_the_gradient():
    direction = flatopt.smooth_gradient(0.9)
    grads = 1.0 + jax.random.normal(jax.random.key(0), (400, 3))
    state, followed = direction.init(grads[0]), []
    for g in grads:
        d, state = direction.update(g, state)
        followed.append(d)
    late = jnp.stack(followed)[200:]
    np.testing.assert_array_less(jnp.std(late, axis=0), 0.5)
    np.testing.assert_allclose(late.mean(0), 1.0, atol=0.3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_shows_and_is_forgotten(bad):
    stage, w = flatopt.vasso(RHO), jnp.array([3.0, 4.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    _, state = stage.update(w, stage.init(w), w, grad_fn=grad_fn)
    updates, after = stage.update(w.at[1].set(bad), state, w, grad_fn=grad_fn)
    assert not jnp.isfinite(updates).all()
    ema = optax.tree.get(after, "ema")
    np.testing.assert_array_equal(ema, optax.tree.get(state, "ema"))
