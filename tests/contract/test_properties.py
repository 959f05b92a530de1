"""Drawn at random: batches, scales, decays, counters; what has failed stays as an example."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from flatopt import measures
from flatopt._averaging.gadam import weight_so_far
from flatopt._core.timing import LAST
from tests import cases
from tests.cases import Case
from tests.contract.test_random import RANDOM

P = PartitionSpec
W = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([-1.0, 0.5])}
G = {"kernel": np.array([[0.3, 2.0], [-1.5, 0.1]]), "bias": np.array([1.0, -0.7])}
EPSILON = 1e-12
# Made once: each is compiled once for all that is drawn.
NORM, ADAPTIVE = flatopt.scale_to_norm(0.5), flatopt.scale_to_adaptive_norm(0.5)
LAYERS, RECORD = flatopt.scale_to_layer_norms(0.5), flatopt.record_gradient_norm()
OUTSTANDING = optax.chain(flatopt.keep_large_zscores(0.0), flatopt.scale_to_norm(0.5))
CLIP = flatopt.wsam(optax.sgd(1.0), 1.0, rho=0.05, gamma=0.5, decouple=False, max_norm=1.0)
IN_UNITS_OF_WEIGHTS = (
    LAYERS,
    flatopt.scale_to_weighted_norm(0.5),
    flatopt.filter_noise(0.5),
    flatopt.adaptive_filter_noise(0.5, eta=1.0, decay=0.9),
)
properties = settings(deadline=None, max_examples=15)


def _loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(w - x))


# One number a batch: its examples; and its weight, zero too, of any size that counts as a number.
sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)
weights = st.lists(st.just(0.0) | st.floats(0.1, 10.0), min_size=1, max_size=5).filter(any)


@given(sizes, st.integers(0, 99))
@properties
def test_unequal_batches_count_by_their_examples(sizes: list[int], seed: int):
    x = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    batches = [jnp.asarray(b) for b in np.split(x, np.cumsum(sizes)[:-1])]
    w = jnp.float32(2.0)
    barrier = measures.linear_barrier(_loss, w, -w, batches)
    whole = measures.linear_barrier(_loss, w, -w, [jnp.asarray(x)])
    for found, expected in zip(jax.tree.leaves(barrier), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    mean = flatopt.average_batch_stats([jnp.mean(b) for b in batches], sizes)
    np.testing.assert_allclose(mean, np.mean(x), rtol=1e-4, atol=1e-5)


@given(weights, st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]), st.booleans())
@example([1.0], 1e-300, True)  # In float32 the weights were 0 or inf.
@example([0.0, 1.0], 1.0, True)  # 0 / 0, in statistics; 0 * NaN, in losses.
@example([0.0, 0.0, 2.0], 1e300, False)
@properties
def test_only_ratios_of_weights_count_and_none_is_nothing(
    weights: list[float], scale: float, stacked: bool
):
    share = np.array(weights) / np.sum(weights)
    x = np.arange(len(weights), dtype=np.float32)
    expected = np.sum(share * np.square(2.0 - x))
    mean = np.sum(share * x)
    x = np.where(share > 0, x, np.nan).astype(np.float32)
    batches: Any = jnp.asarray(x)[:, None] if stacked else [jnp.asarray([v]) for v in x]
    scaled = [scale * weight for weight in weights]
    barrier = measures.linear_barrier(
        _loss, jnp.float32(2.0), jnp.float32(2.0), batches, weights=scaled
    )
    np.testing.assert_allclose(barrier.losses, expected, rtol=1e-4, atol=1e-6)
    stats = flatopt.average_batch_stats([jnp.float32(v) for v in x], scaled)
    np.testing.assert_allclose(stats, mean, rtol=1e-4, atol=1e-6)


def test_statistics_need_a_batch_that_counts():
    with pytest.raises(ValueError, match="all zero"):
        flatopt.average_batch_stats([jnp.ones(2)], [0])


def _norm(tree: Any) -> float:
    return float(
        np.linalg.norm(np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(tree)]))
    )


@functools.partial(jax.jit, static_argnums=0)
def _first_update(tx: Any, g: Any, w: Any) -> Any:
    return tx.update(g, tx.init(w), w, grad_fn=lambda p, i: g)


def _displacement(tx: Any, w_scale: float, g_scale: float) -> Any:
    w = jax.tree.map(lambda x: jnp.asarray(x * w_scale, jnp.float32), W)
    g = jax.tree.map(lambda x: jnp.asarray(x * g_scale, jnp.float32), G)
    moves, _ = _first_update(tx, g, w)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), moves)


@given(st.floats(-30, 30))
@properties
def test_ascents_have_their_length_whatever_the_scale_of_gradients(exponent: float):
    """But for the guard of 1e-12 that the published programs add to the norm."""
    scale = 10.0**exponent

    def guarded(norm: float) -> float:
        return norm / (norm + EPSILON)

    norm = _norm(G) * scale
    for tx in (NORM, OUTSTANDING):
        found = _norm(_displacement(tx, 1.0, scale))
        np.testing.assert_allclose(found, 0.5 * guarded(norm), rtol=1e-4)
    unit = jax.tree.map(lambda w, g: w * g * scale, W, G)
    moves = _displacement(ADAPTIVE, 1.0, scale)
    found = _norm(jax.tree.map(lambda d, w: d / w, moves, W))
    np.testing.assert_allclose(found, 0.5 * guarded(_norm(unit)), rtol=1e-4)
    moves = _displacement(LAYERS, 1.0, scale)
    for name, move in moves.items():
        expected = 0.5 * _norm(W[name]) * guarded(_norm(G[name]) * scale)
        np.testing.assert_allclose(_norm(move), expected, rtol=1e-4)


@given(st.floats(-30, 30))
@example(20.0)  # Squares of weights, in the norm of a filter, were inf, and 0 below.
@example(-25.0)
@properties
def test_displacements_in_units_of_the_weights_scale_with_them(exponent: float):
    scale = 10.0**exponent
    for tx in IN_UNITS_OF_WEIGHTS:
        found, expected = _displacement(tx, scale, 1.0), _displacement(tx, 1.0, 1.0)
        for name in W:
            np.testing.assert_allclose(found[name] / scale, expected[name], rtol=1e-3)


@given(st.floats(-30, 30))
@properties
def test_recorded_and_clipped_norms_of_any_scale(exponent: float):
    scale = 10.0**exponent
    w = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), W)
    g = jax.tree.map(lambda x: jnp.asarray(x * scale, jnp.float32), G)
    _, state = _first_update(RECORD, g, w)
    np.testing.assert_allclose(state.gradient_norm, _norm(G) * scale, rtol=1e-4)
    moves, _ = _first_update(CLIP, g, w)
    norm = _norm(G) * scale
    np.testing.assert_allclose(_norm(moves), min(norm / (norm + 1e-6), norm), rtol=1e-4)


@given(st.floats(-12, -0.1), st.integers(1, 100_000))
@example(-12.0, 1)  # 1 - 1e-12 is 1 in float32, and its weight so far was 0.
@properties
def test_the_weight_so_far_of_any_decay(exponent: float, steps: int):
    b = 1 - 10.0**exponent
    expected = -np.expm1(steps * np.log1p(b - 1))
    np.testing.assert_allclose(weight_so_far(b, jnp.int32(steps)), expected, rtol=1e-4)


def test_the_weight_so_far_without_memory():
    assert float(weight_so_far(0.0, jnp.int32(1))) == 1.0


@given(st.floats(-12, -0.1), st.integers(1, 20))
@example(-12.0, 20)
@settings(deadline=None, max_examples=8)
def test_gradient_means_of_any_decay(exponent: float, steps: int):
    """In float32 the gap to 1 is what counts: the mean moves by it."""
    gap = 1 - (1 - 10.0**exponent)
    for make, first in ((flatopt.smooth_gradient, gap), (flatopt.subtract_gradient_ema, 1.0)):
        kwargs = {"sigma": 1.0} if first == 1.0 else {}
        tx = make(decay=1 - gap, **kwargs)
        state = tx.init(jnp.zeros([]))
        values = jnp.where(jnp.arange(steps) == 0, 1.0, 2.0)
        state, _ = jax.lax.scan(lambda s, g, tx=tx: (tx.update(g, s, g)[1], None), state, values)
        expected = first
        for _ in range(steps - 1):
            expected = (1 - gap) * expected + gap * 2.0
        np.testing.assert_allclose(state.ema, expected, rtol=1e-4)


def _late(state: Any, step: int) -> Any:
    def leaf(x: Any) -> Any:
        return jnp.full_like(x, step) if x.dtype == jnp.int32 and x.ndim == 0 else x

    return jax.tree.map(leaf, state)


@pytest.mark.parametrize("case", cases.main_cases())
def test_counters_stop_at_the_largest_number(case: Case):
    """After 2^31 - 1 updates training goes on; no counter turns negative."""
    params, state = case.trained
    params, state = cases.run(case.build(), params, 3, opt_state=_late(state, LAST - 1))
    evaluated = flatopt.eval_params(state, params)
    for x in jax.tree.leaves((params, state, evaluated)):
        assert bool(jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else True)
        assert x.dtype != jnp.int32 or bool((x >= 0).all())


def _takes(case: Case, *names: str) -> bool:
    parameters = inspect.signature(getattr(flatopt, case.factory)).parameters
    return any(name in parameters for name in names)


@functools.partial(jax.jit, static_argnums=0)
def _update_with(tx: Any, value: Any, state: Any, params: Any) -> Any:
    """An update whose gradients away from `params` are `value`."""

    def gradient(point: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: jnp.full_like(x, value), point)

    extra = {"grad_fn": cases.GradientByHand(gradient), "value": jnp.float32(1)}
    return tx.update(params, state, params, **extra)


@pytest.mark.parametrize("big", [2**31, pytest.param(2**40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", cases.main_cases(takes=lambda c: _takes(c, "start", "every")))
def test_what_begins_beyond_all_counters_never_acts(case: Case, big: int):
    """`start`, and `every` after its first act: also where the counters have stopped."""
    for name in ("start", "every"):
        if not _takes(case, name):
            continue
        # A period is a multiple of `every`.
        period = {"period": big} if case.factory == "periodic_swa" else {}
        tx = case.build(**{name: big}, **period)
        params = {"w": jnp.ones((2, 3))}
        # Of these two `every` is no period of the gradients that they take elsewhere.
        always = case.kind != "stage" or case.factory in ("local_entropy", "sassha")
        gradient = 1.0 if always else jnp.nan
        for step in (1, LAST - 1, LAST):
            updates, _ = _update_with(tx, gradient, _late(tx.init(params), step), params)
            assert bool(jnp.isfinite(updates["w"]).all())


@given(st.floats(0, 100), st.integers(1, 8))
@example(2.0, 1)  # The logarithm of the first share is infinite.
@settings(deadline=None, max_examples=10)
def test_power_means_show_no_infinity_to_the_debugger(exponent: float, steps: int):
    tx = flatopt.power_ema(exponent)
    with jax.debug_infs(True), jax.debug_nans(True):
        w = jnp.float32(0)
        state = tx.init(w)
        for i in range(steps):
            _, state = tx.update(jnp.float32(0), state, jnp.float32(i))
        share = 1.0
        expected = 0.0
        for i in range(steps):
            share = 1 - (1 - 1 / (i + 1)) ** (exponent + 1)
            expected += share * (i - expected)
        found = flatopt.eval_params(state, w)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


GENERATORS = ["threefry2x32"] + [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("rbg", "unsafe_rbg")
]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_random_methods_compile_once_on_explicit_meshes(case: Case, generator: str):
    """As optax.adam does: the first key lies, and is laid out, as those that follow."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("model"), "scalar": P()}
    shapes = {"kernel": (4, 8), "bias": (8,), "scalar": ()}
    tx = case.build(key=jax.random.key(3, impl=generator))
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(jnp.ones(shapes[name]), NamedSharding(mesh, spec))
            for name, spec in specs.items()
        }
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(params, state, params, grad_fn=lambda p, i: p)
            return optax.apply_updates(params, updates), state

        for _ in range(2):
            params, state = step(params, state)
    assert step._cache_size() == 1
