"""Adaptive random weight perturbation."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.replay import Golden, assert_agrees, recorded_noise, replay, replays, torch_optimizer


def test_arwp_is_hold_perturbed_that_starts_displaced():
    """From the same displaced point on, both take the same gradients and damp with them."""
    std, eta, decay = 0.1, 5.0, 0.9
    draws = iter(np.random.default_rng(0).normal(size=(8, 6)))
    z = [jnp.asarray(next(draws), jnp.float32).reshape(2, 3) for _ in range(8)]

    def recorded(first):
        def update(updates, step, params=None):
            del updates, params
            return jnp.stack(z)[step], step + 1

        return optax.GradientTransformation(lambda _: jnp.array(first), update)

    w = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(jnp.sin(w) ** 2))
    stage = optax.chain(flatopt.arwp(std, eta=eta, decay=decay, noise=recorded(0)), optax.sgd(0.1))
    stage_params, stage_state = w, stage.init(w)
    noise = flatopt.adaptive_filter_noise(std, eta=eta, decay=decay, noise=recorded(1))
    hold = flatopt.hold_perturbed(optax.sgd(0.1), noise)
    offset = std * jnp.linalg.norm(w, axis=0, keepdims=True) * z[0]
    hold_params = w + offset
    hold_state = hold.init(w)._replace(offset=offset)
    for _ in range(5):
        updates, stage_state = stage.update(w, stage_state, stage_params, grad_fn=grad_fn)
        stage_params = optax.apply_updates(stage_params, updates)
        updates, hold_state = hold.update(grad_fn(hold_params), hold_state, hold_params)
        hold_params = optax.apply_updates(hold_params, updates)
        centre = flatopt.eval_params(hold_state, hold_params)
        np.testing.assert_allclose(stage_params, centre, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e25])
def test_what_has_no_finite_square_does_not_enter_the_sum(bad):
    """The decayed sum never forgets an inf: its filter would have no noise from then on."""
    w, grads = jnp.ones((2, 3)), jnp.ones((2, 3)).at[1, 2].set(bad)
    perturbation = flatopt.adaptive_filter_noise(0.1)
    _, state = perturbation.update(w, perturbation.init(w), w)
    _, after = perturbation.update(grads, state, w)
    np.testing.assert_array_equal(after.fisher, state.fisher)
    stage = flatopt.arwp(0.1)
    _, state = stage.update(w, stage.init(w), w, grad_fn=lambda w, i: w)
    _, after = stage.update(w, state, w, grad_fn=lambda w, i: grads)
    np.testing.assert_array_equal(after.fisher, state.fisher)


@replays("arwp")
def test_replays(golden: Golden) -> None:
    hyper = golden.hyper
    noise = recorded_noise(golden)
    stage = flatopt.arwp(
        hyper["std"], eta=hyper["eta"], decay=hyper["beta"], filter_axis=0, noise=noise
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))
