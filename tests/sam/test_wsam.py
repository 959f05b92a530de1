"""WSAM."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05
SAM = flatopt.sam(RHO)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


def test_wsam_coupled_with_half_the_weight_is_sam():
    tx = flatopt.wsam(cases.sgd(), cases.LEARNING_RATE, rho=RHO, gamma=0.5, decouple=False)
    cases.assert_close(cases.run(tx)[0], _train(SAM))


def test_wsam_decoupled_adds_the_sharpness_outside_the_momentum():
    tx = flatopt.wsam(cases.sgd(), cases.LEARNING_RATE, rho=RHO, gamma=0.8)
    params, batch = cases.init_params(), cases.make_batch()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    clean = grad_fn(params)
    _, state = tx.update(clean, tx.init(params), params, grad_fn=grad_fn)
    plain = cases.sgd()
    _, plain_state = plain.update(clean, plain.init(params), params)
    cases.assert_close(state.inner_state, plain_state)


@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize(("size", "clipped"), [(1e-25, 5e-25), (0.1, 0.5), (1e25, 1.0)])
def test_clipping_knows_gradients_of_every_size(size, clipped, decouple):
    """The squares of their entries leave the range of float32."""
    tx = flatopt.wsam(optax.sgd(1.0), 1.0, rho=RHO, gamma=0.8, decouple=decouple, max_norm=1.0)
    w, grads = jnp.array([3.0, 4.0]), size * jnp.array([3.0, 4.0])
    updates, _ = tx.update(grads, tx.init(w), w, grad_fn=lambda w, i: grads)
    np.testing.assert_allclose(updates, -clipped * w / 5, rtol=1e-5)


def test_no_schedule_of_the_clipping():
    with pytest.raises(TypeError, match=r"max_norm=.* A schedule is not taken here"):
        flatopt.wsam(cases.sgd(), 0.1, rho=RHO, max_norm=optax.constant_schedule(1.0))


def test_the_optimiser_is_a_transformation():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        flatopt.wsam(0.1, 0.1, rho=RHO)


@replays("wsam")
def test_replays(golden: Golden) -> None:
    hyper, rate = golden.hyper, golden.learning_rate
    tx = flatopt.wsam(
        torch_optimizer(hyper, rate, hyper["base"]),
        rate,
        **{name: hyper[name] for name in ("rho", "gamma", "decouple", "adaptive", "max_norm")},
    )
    assert_agrees(golden.results, replay(golden, tx))
