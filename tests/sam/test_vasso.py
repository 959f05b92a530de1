"""VaSSO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
