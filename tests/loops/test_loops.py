"""Accumulation, mixed precision and m-sharpness: what training loops do around an optimiser."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, PartitionSpec

import flatopt
from tests import cases
from tests.cases import Case

P = PartitionSpec


@pytest.mark.parametrize("microbatches", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", cases.main_cases(needs=lambda c: c.needs_grad_fn))
def test_microbatches_equal_the_whole_batch(case: Case, microbatches: int):
    """Ascent and descent gradient are those of the whole batch, to 1e-6 in float32."""

    def train(number: int | None) -> Any:
        tx, params = case.build(), cases.init_params()

        @jax.jit
        def step(params: Any, opt_state: Any, grad_fn: flatopt.GradFn) -> Any:
            _, grads = grad_fn.value_and_grad(params)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), opt_state

        opt_state = tx.init(params)
        for i in range(2):
            batch = cases.make_batch(i, size=16)
            grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch, microbatches=number)
            params, opt_state = step(params, opt_state, grad_fn)
        return params

    cases.assert_close(train(microbatches), train(None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("microbatches", [None, 4])
def test_the_value_is_that_of_the_clean_pass(microbatches: int | None, has_aux: bool):
    """With weights too, and by a forward pass alone."""
    params, batch = cases.init_params(), cases.make_batch(size=16)
    weights = jnp.arange(16.0)

    def loss_fn(params: Any, batch: Any) -> Any:
        loss = cases.loss_fn(params, batch)
        return (loss, batch[0]) if has_aux else loss

    for w in (None, weights) if microbatches else (None,):
        grad_fn = flatopt.make_grad_fn(
            loss_fn, batch, has_aux=has_aux, microbatches=microbatches, weights=w
        )
        value, _ = grad_fn.value_and_grad(params)
        expected = value[0] if has_aux else value
        np.testing.assert_allclose(grad_fn.value(params), expected, rtol=1e-6)
    flops = [
        jax.jit(f).lower(params).compile().cost_analysis()["flops"]
        for f in (grad_fn.value, grad_fn.value_and_grad)
    ]
    assert flops[0] < 0.6 * flops[1]


# Mixed precision: float32 parameters, a forward and backward pass in half precision.

HALF = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}
TINY = 1e-8  # So small a loss that float16 gradients of it underflow.


def _half_loss(params: Any, batch: Any, dtype: Any) -> jax.Array:
    half = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    return cases.loss_fn(*half).astype(jnp.float32)


def _unscaled(loss: Any, scale: Any) -> Any:
    """The gradient of `loss`, computed on `scale * loss`."""

    def gradient(params: Any, i: Any = 0) -> Any:
        del i
        grads = jax.grad(lambda p: scale * loss(p))(params)
        return jax.tree.map(lambda g: g / scale, grads)

    return gradient


def _one_sam_step(gradient: Any, params: Any) -> tuple[Any, Any]:
    """Updates, and the displacement at which the second gradient is taken."""
    stage, seen = flatopt.sam(0.05), []

    def grad_fn(point: Any, i: Any) -> Any:
        seen.append(optax.tree.sub(point, params))
        return gradient(point, i)

    updates, _ = stage.update(gradient(params), stage.init(params), params, grad_fn=grad_fn)
    return updates, seen[0]


@pytest.mark.parametrize("scale", [2.0**8, 2.0**14])
@pytest.mark.parametrize("dtype", HALF)
def test_static_loss_scale_undone_before_the_norm(dtype: str, scale: float):
    """The displacement has length rho and the descent gradient its size, whatever the scale."""
    params, batch = cases.init_params(), cases.make_batch()
    gradient = _unscaled(lambda p: _half_loss(p, batch, HALF[dtype]), scale)
    updates, displacement = _one_sam_step(gradient, params)
    np.testing.assert_allclose(optax.tree.norm(displacement), 0.05, rtol=1e-5)
    expected, _ = _one_sam_step(jax.grad(lambda p, i=0: cases.loss_fn(p, batch)), params)
    error = optax.tree.norm(optax.tree.sub(updates, expected)) / optax.tree.norm(expected)
    assert error < (0.01 if dtype == "float16" else 0.05)


def test_loss_scale_saves_gradients_that_underflow_in_float16():
    params, batch = cases.init_params(), cases.make_batch()

    def small_loss(params: Any, dtype: Any = jnp.float16) -> jax.Array:
        return _half_loss(params, batch, dtype) * TINY

    plain, _ = _one_sam_step(_unscaled(small_loss, 1.0), params)
    assert float(optax.tree.norm(plain)) == 0.0
    scaled, displacement = _one_sam_step(_unscaled(small_loss, 2.0**20), params)
    # Up to the epsilon that guards the division by the norm.
    np.testing.assert_allclose(optax.tree.norm(displacement), 0.05, rtol=1e-3)
    expected, _ = _one_sam_step(jax.grad(lambda p, i=0: small_loss(p, jnp.float32)), params)
    error = optax.tree.norm(optax.tree.sub(scaled, expected)) / optax.tree.norm(expected)
    assert error < 0.01


def _dynamic_step(tx: Any, batch: Any) -> Any:
    """A loop with a dynamic loss scale: lower when either pass overflows, else higher in time."""

    @jax.jit
    def step(params: Any, opt_state: Any, scale: jax.Array) -> Any:
        gradient = _unscaled(lambda p: _half_sum(p, batch, scale), scale)
        updates, opt_state = tx.update(gradient(params), opt_state, params, grad_fn=gradient)
        finite = optax.tree.get(opt_state, "last_finite")
        scale = jnp.where(finite, scale * 2, scale / 2)
        return optax.apply_updates(params, updates), opt_state, scale

    return step


def _half_sum(params: Any, batch: Any, scale: jax.Array) -> jax.Array:
    """Scaled inside float16, as real loss scales are, so that too large a one overflows."""
    half = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch))
    scaled = cases.loss_fn(*half) * scale.astype(jnp.float16)
    return scaled.astype(jnp.float32) / scale


def test_dynamic_loss_scale_skips_overflowing_steps_and_finds_its_level():
    tx = optax.chain(flatopt.sam(0.05), optax.apply_if_finite(cases.sgd(), 1000))
    params = cases.init_params()
    opt_state, scale, skipped = tx.init(params), jnp.float32(2.0**14), 0
    step = _dynamic_step(tx, cases.make_batch())
    for _ in range(30):
        new_params, opt_state, new_scale = step(params, opt_state, scale)
        if new_scale < scale:
            skipped += 1
            cases.assert_equal(new_params, params)
        params, scale = new_params, new_scale
    assert 1 <= skipped < 20
    assert opt_state[1].total_notfinite == skipped
    start = cases.loss_fn(cases.init_params(), cases.make_batch())
    assert cases.loss_fn(params, cases.make_batch()) < 0.7 * start


def test_flax_dynamic_scale_serves_both_passes():
    params, batch = cases.init_params(), cases.make_batch()
    tx = optax.chain(flatopt.sam(0.05), optax.apply_if_finite(cases.sgd(), 10))
    scale = DynamicScale(scale=jnp.float32(2.0**10))

    def half_loss(params: Any) -> jax.Array:
        return _half_loss(params, batch, jnp.float16)

    scale, _, _, grads = scale.value_and_grad(half_loss)(params)
    updates, _ = tx.update(
        grads,
        tx.init(params),
        params,
        grad_fn=lambda p, i: scale.value_and_grad(half_loss)(p)[3],
    )
    expected, _ = cases.run(optax.chain(flatopt.sam(0.05), cases.sgd()), params, steps=1)
    cases.assert_close(optax.apply_updates(params, updates), expected, rtol=2e-2, atol=2e-3)


HIDING = jnp.array([1.0, 2.0, 3.0])


def _hiding_gradient(params: Any) -> Any:
    """A leaky ReLU: the gradient of where(x > 0, x, x / 10) at NaN is 1 / 10."""
    return jax.grad(lambda x: jnp.sum(jnp.where(x > 0, x, x / 10)))(params)


def test_a_network_that_hides_nan_needs_a_guard_on_each_pass():
    """The second pass does not feel that an inf of the clean gradient made its point NaN."""
    inner = optax.chain(flatopt.sam(0.05), optax.apply_if_finite(cases.sgd(), 5))
    both = optax.apply_if_finite(inner, 5)
    grads = _hiding_gradient(HIDING).at[0].set(jnp.inf)
    results = []
    for tx in (inner, both):
        updates, _ = tx.update(
            grads, tx.init(HIDING), HIDING, grad_fn=lambda p, i: _hiding_gradient(p)
        )
        results.append(float(optax.tree.norm(updates)))
    assert results[0] > 0  # Not seen in the second gradient.
    assert results[1] == 0


@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_a_guard_on_each_pass_skips_the_whole_step(where: str):
    tx = optax.chain(flatopt.sam(0.05), optax.apply_if_finite(cases.sgd(), 5))
    tx = optax.apply_if_finite(tx, 5)
    params, opt_state = cases.run(tx, steps=2)
    good = jax.grad(cases.loss_fn)(params, cases.make_batch())
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.inf), good)
    updates, new = tx.update(
        bad if where == "clean" else good,
        opt_state,
        params,
        grad_fn=lambda p, i: bad if where == "perturbed" else good,
    )
    assert float(optax.tree.norm(updates)) == 0.0
    before, after = (s.inner_state[1].inner_state for s in (opt_state, new))
    cases.assert_equal(after, before)


# m-sharpness: each of m groups of examples ascends on its own; the descent gradients are averaged.

GROUPS = 8
STAGES = {
    "sam": flatopt.sam(0.5),
    "asam": flatopt.asam(0.5),
    "two ascent steps": flatopt.gradient_at(flatopt.scale_to_norm(0.2), num_steps=2),
}


def _group_gradients(stage: Any, params: Any, state: Any, groups: Any) -> tuple[Any, Any]:
    """The mean over groups (leading axis) of the sharpness-aware gradient of each."""

    def one(group: Any) -> tuple[Any, Any]:
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, group)
        return stage.update(grad_fn(params), state, params, grad_fn=grad_fn)

    grads, states = jax.vmap(one)(groups)
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
    return mean, jax.tree.map(lambda s: s[0], states)


def _groups(batch: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(GROUPS, -1, *x.shape[1:]), batch)


def _train_m_sam(stage: Any, devices: int) -> Any:
    """Three steps of m-SAM with `GROUPS` groups on that many devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    optimizer = cases.sgd()

    def step(params: Any, state: Any, opt_state: Any, groups: Any) -> Any:
        grads, state = _group_gradients(stage, params, state, groups)
        grads = jax.lax.pmean(grads, "data")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    specs = {"in_specs": (P(), P(), P(), P("data")), "out_specs": P(), "check_vma": False}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    params = cases.init_params()
    state, opt_state = stage.init(params), optimizer.init(params)
    for i in range(3):
        groups = _groups(cases.make_batch(i, size=16))
        params, state, opt_state = mapped(params, state, opt_state, groups)
    return params, state


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("name", STAGES)
def test_m_sharpness_does_not_depend_on_the_number_of_devices(name: str, devices: int):
    cases.assert_close(_train_m_sam(STAGES[name], devices), _train_m_sam(STAGES[name], 1))


def test_m_sharpness_by_vmap_is_the_mean_of_the_groups():
    params, groups, stage = cases.init_params(), _groups(cases.make_batch(size=16)), STAGES["sam"]
    actual, _ = _group_gradients(stage, params, stage.init(params), groups)
    total = optax.tree.zeros_like(params)
    for j in range(GROUPS):
        group = jax.tree.map(lambda x, j=j: x[j], groups)
        grads = jax.grad(cases.loss_fn)(params, group)
        scale = 0.5 / optax.tree.norm(grads)
        point = jax.tree.map(lambda w, g, s=scale: w + s * g, params, grads)
        total = optax.tree.add(total, jax.grad(cases.loss_fn)(point, group))
    cases.assert_close(actual, optax.tree.scale(1 / GROUPS, total))


def test_one_group_is_sam_and_more_groups_are_not():
    params, batch, stage = cases.init_params(), cases.make_batch(size=16), STAGES["sam"]
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    whole, _ = stage.update(grad_fn(params), stage.init(params), params, grad_fn=grad_fn)
    one = jax.tree.map(lambda x: x[None], batch)
    cases.assert_close(_group_gradients(stage, params, stage.init(params), one)[0], whole)
    many, _ = _group_gradients(stage, params, stage.init(params), _groups(batch))
    assert float(optax.tree.norm(optax.tree.sub(many, whole))) > 1e-2


def test_microbatches_of_a_mean_over_tokens():
    """The mean of the means is not the mean: each part counts as its tokens."""
    mask = jnp.array([[1, 1, 1, 1.0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    y = jnp.array([[1.0, 2, 3, 4], [10, 0, 0, 0], [0, 0, 0, 0], [5, 6, 0, 0]])

    def loss_fn(w, y, mask):
        loss = jnp.sum(mask * (w - y) ** 2) / jnp.sum(mask)
        return loss, {"mean": jnp.sum(mask * y) / jnp.sum(mask), "count": jnp.array(1)}

    w, tokens = jnp.array(0.5), mask.sum(1)
    whole = flatopt.make_grad_fn(loss_fn, y, mask, has_aux=True)
    (loss, aux), grads = whole.value_and_grad(w)
    for parts in (1, 2, 4):  # With four, one part has no token at all.
        grad_fn = flatopt.make_grad_fn(
            loss_fn, y, mask, has_aux=True, microbatches=parts, weights=tokens
        )
        (found, found_aux), found_grads = jax.jit(lambda g, w: g.value_and_grad(w))(grad_fn, w)
        np.testing.assert_allclose(found_grads, grads, rtol=1e-6)
        np.testing.assert_allclose(found, loss, rtol=1e-6)
        np.testing.assert_allclose(found_aux["mean"], aux["mean"], rtol=1e-6)
        assert found_aux["count"] == 1
    plain = flatopt.make_grad_fn(loss_fn, y, mask, has_aux=True, microbatches=2)
    assert abs(plain(w) - grads) > 0.1
    with pytest.raises(ValueError, match="one number an example"):
        flatopt.make_grad_fn(loss_fn, y, mask, weights=mask)
    with pytest.raises(ValueError, match="need one of equal length"):
        flatopt.make_grad_fn(loss_fn, y, mask, has_aux=True, microbatches=2, weights=tokens[:2])(w)
