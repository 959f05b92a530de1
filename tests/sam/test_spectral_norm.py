"""The ascent step in the spectral norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt

RHO = 0.3


def _displaced(grads):
    perturbation = flatopt.scale_to_spectral_norm(RHO)
    return perturbation.update(grads, perturbation.init(grads))[0]


def _polar(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e20])
def test_it_is_the_polar_factor_of_the_gradient(shape, scale: float):
    matrix = np.random.default_rng(0).normal(size=shape)
    displacement = _displaced(jnp.asarray(scale * matrix, jnp.float32))
    np.testing.assert_allclose(displacement, RHO * _polar(matrix), atol=2e-4 * RHO)


@pytest.mark.parametrize("smallest", [1.0, 1e-1, 1e-2, 2e-3])
def test_singular_values_down_to_a_thousandth_of_the_norm_are_lifted_to_one(smallest: float):
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
    values = np.array([1.0, 0.7, 0.5, 0.3, 0.1, smallest])
    with jax.enable_x64(True):
        displacement = _displaced(jnp.asarray(left @ np.diag(values) @ right))
        found = jnp.linalg.svd(displacement, compute_uv=False)
    np.testing.assert_allclose(found, RHO, rtol=1e-3)


def test_no_displacement_of_that_spectral_norm_raises_the_linear_loss_more():
    """The product with the gradient is rho times its nuclear norm, the dual of the spectral one."""
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    product = jnp.vdot(gradient, _displaced(gradient))
    nuclear = jnp.linalg.svd(gradient, compute_uv=False).sum()
    np.testing.assert_allclose(product, RHO * nuclear, rtol=1e-4)
    assert product > 1.2 * RHO * jnp.linalg.norm(gradient)  # More than SAM's step of that length.


def test_vectors_and_scalars_move_by_rho_and_kernels_of_convolutions_are_matrices():
    rng = np.random.default_rng(3)
    grads = {
        "bias": jnp.array([3.0, 4.0]),
        "scale": jnp.array(-7.0),
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32),
        "nothing": None,
        "empty": jnp.zeros((0, 4)),
    }
    displacement = _displaced(grads)
    np.testing.assert_allclose(displacement["bias"], [0.6 * RHO, 0.8 * RHO], rtol=1e-6)
    np.testing.assert_allclose(displacement["scale"], -RHO, rtol=1e-6)
    matrix = np.asarray(grads["kernel"]).reshape(18, 5)
    np.testing.assert_allclose(
        displacement["kernel"].reshape(18, 5), RHO * _polar(matrix), atol=2e-4 * RHO
    )
    assert displacement["nothing"] is None
    assert displacement["empty"].shape == (0, 4)


def test_directions_without_gradient_stay():
    displacement = _displaced(jnp.outer(jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0, 1.0])))
    found = jnp.linalg.svd(displacement, compute_uv=False)
    np.testing.assert_allclose(found, [RHO, 0.0], atol=1e-5)
    assert (_displaced(jnp.zeros((3, 2))) == 0).all()


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_what_is_not_finite_shows(bad):
    displacement = _displaced({"a": jnp.ones((2, 2)).at[0, 0].set(bad), "b": jnp.ones((2, 2))})
    assert jnp.isnan(displacement["a"]).all()
    assert jnp.isfinite(displacement["b"]).all()


def test_bfloat16_is_computed_in_float32():
    matrix = np.random.default_rng(4).normal(size=(8, 4))
    displacement = _displaced(jnp.asarray(matrix, jnp.bfloat16))
    assert displacement.dtype == jnp.bfloat16
    expected = RHO * _polar(np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32))
    np.testing.assert_allclose(np.asarray(displacement, np.float32), expected, atol=4e-3 * RHO)


def test_it_stands_before_muon():
    tx = optax.chain(
        flatopt.gradient_at(flatopt.scale_to_spectral_norm(0.05)), optax.contrib.muon(0.02)
    )
    params = {"kernel": jnp.eye(3) + 0.1, "bias": jnp.ones(3)}
    grad_fn = flatopt.make_grad_fn(lambda p: jnp.sum((p["kernel"] @ p["bias"]) ** 2))

    @jax.jit
    def step(params, opt_state):
        loss, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    assert losses[-1] < 0.2 * losses[0]
