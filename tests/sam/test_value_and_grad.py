"""The one-graph form is SAM, and its model stands in the program once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.3


def _clean_and_sharp(perturbation, num_steps=None):
    """Value and gradient as the stage of the chain gives them."""
    params, batch = cases.init_params(), cases.make_batch()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    stage = flatopt.gradient_at(perturbation, num_steps=num_steps)
    value, clean = grad_fn.value_and_grad(params)
    sharp, _ = stage.update(clean, stage.init(params), params, grad_fn=grad_fn)
    return value, sharp


@pytest.mark.parametrize("num_steps", [None, 1, 3])
@pytest.mark.parametrize(
    "perturbation",
    [flatopt.scale_to_norm(RHO), flatopt.scale_to_adaptive_norm(RHO, 0.01)],
    ids=["sam", "asam"],
)
def test_equals_the_stage(perturbation, num_steps):
    function = flatopt.sam_value_and_grad(cases.loss_fn, perturbation, num_steps=num_steps)
    value, grads = jax.jit(function)(cases.init_params(), cases.make_batch())
    expected_value, expected = _clean_and_sharp(perturbation, num_steps)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    cases.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_zero_radius_is_the_plain_gradient():
    params, batch = cases.init_params(), cases.make_batch()
    function = flatopt.sam_value_and_grad(cases.loss_fn, flatopt.scale_to_norm(0.0))
    plain = jax.jit(jax.value_and_grad(cases.loss_fn))(params, batch)
    cases.assert_close(jax.jit(function)(params, batch), plain, rtol=1e-6, atol=1e-7)


def test_auxiliary_output_is_that_of_the_clean_pass():
    def loss_fn(w, x):
        return 0.5 * jnp.sum((x * w) ** 2), {"seen": w, "kind": jnp.array(7)}

    w = jnp.array([3.0, 4.0])
    function = flatopt.sam_value_and_grad(loss_fn, flatopt.scale_to_norm(0.5), has_aux=True)
    (loss, aux), grads = function(w, x=1.0)
    np.testing.assert_allclose(loss, 12.5)
    np.testing.assert_array_equal(aux["seen"], w)
    assert aux["kind"] == 7
    np.testing.assert_allclose(grads, [3.3, 4.4], rtol=1e-6)


def test_microbatches_are_the_whole_batch():
    params, batch = cases.init_params(), cases.make_batch()
    perturbation = flatopt.scale_to_norm(RHO)
    whole, parts = (
        flatopt.sam_value_and_grad(cases.loss_fn, perturbation, microbatches=n)(params, batch)
        for n in (None, 4)
    )
    cases.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_schedule_follows_step():
    rho = optax.linear_schedule(0.0, 1.0, 10)
    function = flatopt.sam_value_and_grad(cases.loss_fn, flatopt.scale_to_norm(rho))
    fixed = flatopt.sam_value_and_grad(cases.loss_fn, flatopt.scale_to_norm(0.4))
    params, batch = cases.init_params(), cases.make_batch()
    cases.assert_close(function(params, batch, step=4), fixed(params, batch), rtol=1e-5, atol=1e-6)


def test_the_model_is_traced_once_and_stands_once_in_the_program():
    traces = []

    def loss_fn(w, x):
        traces.append(1)
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    w, x = jnp.ones([8, 8]), jnp.ones([4, 8])
    function = flatopt.sam_value_and_grad(loss_fn, flatopt.scale_to_norm(RHO))
    one_graph = jax.jit(function).lower(w, x).as_text()
    assert len(traces) == 1
    plain = jax.jit(jax.value_and_grad(loss_fn)).lower(w, x).as_text()
    assert one_graph.count("dot_general") == plain.count("dot_general") > 0


def test_dtypes_are_kept():
    params = cases.init_params(jnp.bfloat16)
    function = flatopt.sam_value_and_grad(cases.loss_fn, flatopt.scale_to_norm(RHO))
    _, grads = function(params, cases.make_batch())
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_a_gradient_that_is_not_finite_gives_one():
    function = flatopt.sam_value_and_grad(
        lambda w: jnp.sum(w) * jnp.inf, flatopt.scale_to_norm(1.0)
    )
    assert not jnp.isfinite(function(jnp.ones(3))[1]).any()


def test_bad_arguments_raise():
    with pytest.raises(TypeError, match="loss_fn="):
        flatopt.sam_value_and_grad(0.5, flatopt.scale_to_norm(1.0))
    with pytest.raises(ValueError, match="num_steps=0"):
        flatopt.sam_value_and_grad(cases.loss_fn, flatopt.scale_to_norm(1.0), num_steps=0)
    noisy = flatopt.sam_value_and_grad(cases.loss_fn, flatopt.filter_noise(0.1))
    with pytest.raises(ValueError, match="gradient_at"):
        noisy(cases.init_params(), cases.make_batch())
