"""Trees of every dtype and shape: they keep their dtypes, or a TypeError says why not."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.cases import Case


def _train(case: Case, params: Any, steps: int = 3) -> tuple[Any, Any, Any]:
    """Runs on the quadratic |params|^2 / 2, whose ascent direction is `params` in any dtype."""
    tx = case.build()
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any) -> Any:
        value = 0.5 * optax.tree.norm(params, squared=True)
        grad_fn = cases.GradientByHand(lambda p, i: p)
        updates, opt_state = tx.update(params, opt_state, params, value=value, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, updates

    updates = None
    for _ in range(steps):
        params, opt_state, updates = step(params, opt_state)
    return params, opt_state, updates


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "complex64"]
    + [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("float16", "float64")],
)
@pytest.mark.parametrize("case", cases.main_cases())
def test_dtypes_are_kept(case: Case, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        start = {
            "kernel": jnp.linspace(0.5, 1.5, 6, dtype=dtype).reshape(2, 3),
            "scalar": jnp.asarray(1.0, dtype),
            "empty": jnp.zeros([0, 2], dtype),
        }
        params, state, updates = _train(case, start)
        evaluated = flatopt.eval_params(state, params)
        for tree in (params, updates, evaluated):
            assert jax.tree.structure(tree) == jax.tree.structure(start)
            assert {x.dtype.name for x in jax.tree.leaves(tree)} == {dtype}
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
        assert float(jnp.abs(params["scalar"])) < 1.0


@pytest.mark.parametrize("case", cases.main_cases())
def test_mixed_tree_with_none_and_half_precision(case: Case):
    start = {
        "half": jnp.ones([3], jnp.bfloat16),
        "single": jnp.ones([2], jnp.float32),
        "nothing": None,
        "nested": (jnp.ones([], jnp.float16), []),
    }
    params, state, _ = _train(case, start)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    evaluated = flatopt.eval_params(state, params)
    expected = [x.dtype for x in jax.tree.leaves(start)]
    assert [x.dtype for x in jax.tree.leaves(params)] == expected
    assert [x.dtype for x in jax.tree.leaves(evaluated)] == expected


@pytest.mark.parametrize("case", cases.cases())
def test_empty_tree(case: Case):
    params, state, _ = _train(case, {})
    assert params == {}
    assert flatopt.eval_params(state, params) == {}


@pytest.mark.parametrize("case", cases.main_cases())
def test_float64_is_computed_in_float64(case: Case):
    """Against float32, the first steps agree to float32's precision and no further."""
    with jax.enable_x64(True):
        double, *_ = _train(case, {"w": jnp.linspace(0.3, 1.7, 7, dtype=jnp.float64)})
        single, *_ = _train(case, {"w": jnp.linspace(0.3, 1.7, 7, dtype=jnp.float32)})
        difference = np.abs(np.asarray(double["w"]) - np.asarray(single["w"], np.float64)).max()
    assert 1e-12 < difference < 1e-5


def test_norm_of_a_float16_gradient_does_not_overflow():
    grads = jnp.full([4], 200.0, jnp.float16)  # The square, 40000 x 4, is over float16's 65504.
    stage = flatopt.scale_to_norm(1.0)
    displacement, _ = stage.update(grads, stage.init(grads))
    np.testing.assert_allclose(np.asarray(displacement, np.float32), 0.5, rtol=1e-3)


def test_tiny_float16_gradient_keeps_its_direction():
    grads = jnp.array([3e-6, 4e-6], jnp.float16)  # Squares underflow in float16.
    stage = flatopt.scale_to_norm(1.0)
    displacement, _ = stage.update(grads, stage.init(grads))
    expected = np.asarray(grads, np.float32)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(np.asarray(displacement, np.float32), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "make", [lambda: flatopt.params_ema(0.9999, debias=False), lambda: flatopt.swa()]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_average_of_half_precision_weights_moves(make, dtype):
    """Accumulated in bfloat16, an average with decay .9999 would stand still for ever."""
    stage, params = make(), jnp.ones([2], dtype)
    state = stage.init(params)
    update = jax.jit(lambda s, p: stage.update(jnp.zeros_like(p), s, p)[1])
    state = update(state, params)
    for _ in range(100):
        state = update(state, params + 1)
    assert state.mean.dtype == jnp.float32
    weight = 1 - 0.9999**100 if isinstance(make(), tuple) and state.total_weight == 1 else 100 / 101
    np.testing.assert_allclose(state.mean, 1 + weight, rtol=1e-4)
    assert flatopt.eval_params(state, params).dtype == dtype


def test_average_in_a_chosen_dtype():
    stage, params = flatopt.swa(accumulator_dtype=jnp.float16), jnp.ones([2])
    assert stage.init(params).mean.dtype == jnp.float16


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(flatopt.friendly_sam, 0.5),
        functools.partial(flatopt.vasso, 0.5),
        functools.partial(flatopt.looksam, 0.5, every=3, alpha=0.5),
    ],
    ids=["friendly_sam", "vasso", "looksam"],
)
def test_what_a_stage_remembers_in_half_precision(make):
    """Half the state, updates of the parameters' dtype, and a run that stays near the full one."""
    params, batch = cases.init_params(), cases.make_batch()
    runs, sizes = [], []
    for dtype in (None, jnp.bfloat16):
        tx = optax.chain(make(accumulator_dtype=dtype), optax.sgd(0.1))
        step = jax.jit(cases.train_step(tx, cases.loss_fn))
        carry = (params, tx.init(params))
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(carry[1]) if x.ndim))
        for _ in range(10):
            carry = step(*carry, batch)
        runs.append(carry[0])
        assert {x.dtype for x in jax.tree.leaves(carry[0])} == {jnp.dtype(jnp.float32)}
        assert sum(x.nbytes for x in jax.tree.leaves(carry[1]) if x.ndim) == sizes[-1]
    assert sizes[1] == sizes[0] / 2
    moved = optax.tree.norm(optax.tree.sub(runs[0], params))
    assert 0 < optax.tree.norm(optax.tree.sub(*runs)) < 0.02 * moved


def test_integer_leaves_are_copied_not_averaged():
    """Whole collections can be averaged: BatchNorm counters come from the last model."""
    stage = flatopt.swa()
    params = {"mean": jnp.array([1.0]), "steps": jnp.array(5)}
    state = stage.init(params)
    for steps in (5, 8):
        params = {"mean": jnp.array([float(steps)]), "steps": jnp.array(steps)}
        _, state = stage.update(jax.tree.map(jnp.zeros_like, params), state, params)
    evaluated = flatopt.eval_params(state, params)
    assert evaluated["steps"] == 8
    assert evaluated["steps"].dtype == params["steps"].dtype
    np.testing.assert_allclose(evaluated["mean"], [6.5])


ACCUMULATING = [
    case
    for case in cases.CASES
    if not case.variant
    and "accumulator_dtype" in inspect.signature(getattr(flatopt, case.factory)).parameters
]


@pytest.mark.parametrize("case", ACCUMULATING, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_real_accumulator_keeps_the_imaginary_part(case: cases.Case, dtype: Any):
    """What accumulates complex parameters is complex, of at least the precision asked for."""
    params = {"w": jnp.array([1.0 + 2.0j, 3.0 - 1.0j], jnp.complex64)}
    tx = case.build(accumulator_dtype=dtype)
    opt_state = tx.init(params)
    grad_fn = lambda p, i: jax.tree.map(lambda x: 0.1 * x, p)  # noqa: E731
    for _ in range(3):
        updates, opt_state = tx.update(
            grad_fn(params, 0), opt_state, params, value=1.0, grad_fn=grad_fn
        )
        params = optax.apply_updates(params, updates)
    kept = [x for x in jax.tree.leaves(opt_state) if x.size % 2 == 0 and x.ndim]
    assert any(jnp.iscomplexobj(x) for x in kept)
    found = flatopt.eval_params(opt_state, params)["w"]
    assert (jnp.abs(found.imag) > 0.1).all()
