"""SAM."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.replay import Golden, adamw_decaying_after, assert_sam_agrees, replays, torch_optimizer


@replays("sam")
def test_replays(golden: Golden) -> None:
    hyper = golden.hyper
    rho = hyper["rho"]
    stage = flatopt.asam(rho, eta=0.0) if hyper.get("adaptive") else flatopt.sam(rho)
    base = torch_optimizer(hyper, golden.learning_rate, hyper.get("base", "sgd"))
    assert_sam_agrees(golden, optax.chain(stage, base))


@replays("adamw_sam")
def test_replays_adamw_sam(golden: Golden) -> None:
    assert_sam_agrees(
        golden, optax.chain(flatopt.sam(golden.hyper["rho"]), adamw_decaying_after(golden))
    )


def test_the_gradient_is_that_at_the_top_of_the_ascent():
    w = jnp.array([3.0, 4.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    stage = flatopt.sam(0.5)
    updates, _ = stage.update(grad_fn(w), stage.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(updates, w * 5.5 / 5.0, rtol=1e-6)


@pytest.mark.parametrize(("start", "every", "sharp"), [(2, None, [2, 3, 4, 5]), (1, 2, [1, 3, 5])])
def test_start_is_the_number_of_updates_made_before_the_first_sharp_one(start, every, sharp):
    stage, w = flatopt.sam(0.5, start=start, every=every), jnp.array([3.0, 4.0])
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    state, seen = stage.init(w), []
    for made in range(6):
        updates, state = stage.update(w, state, w, grad_fn=grad_fn)
        if not np.allclose(updates, w):
            seen.append(made)
    assert seen == sharp
