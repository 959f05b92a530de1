"""Parameters and gradients of every dtype, and leaves that no gradient moves.

The rule: what plain optax trains, every method trains. Mostly traced, not computed: structures and
dtypes that do not match in a branch or a loop show at trace time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import tree_math
from tests import cases
from tests.cases import Case

DTYPES = ("bfloat16", "float32", "float64")
# The plain optimiser that a method with a step of its own stands for.
COUNTERPARTS = {
    "langevin": lambda: optax.sgd(0.05),
    "gadam": lambda: optax.adamw(0.05),
    "gadamx": lambda: optax.adamw(0.05),
    "pace": lambda: optax.adamw(0.05),
    "schedule_free_plus": lambda: optax.adam(0.05),
    "fixed_elr": lambda: optax.sgd(0.05),
}
STILL = {
    "count": jnp.array([3, 200, 7]),
    "flag": jnp.array([True, False]),
    "byte": jnp.array([200, 0], jnp.uint8),
}
# Loud enough that what is noise in an integer would show.
LOUD = {"std": 10.0, "noise": 10.0, "temperature": 1e4, "rho": 10.0, "budget": 10.0}


def _describe(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(jnp.result_type(x).name, jnp.shape(x)) for x in jax.tree.leaves(tree)]


def _dtypes(tree: Any) -> list[Any]:
    return [jnp.result_type(x) for x in jax.tree.leaves(tree)]


def _step(tx: Any, gradient: Any) -> Any:
    tx = optax.with_extra_args_support(tx)

    grad_fn = cases.GradientByHand(lambda p, i: gradient(p), tree_math.norm)

    def step(params: Any, state: Any) -> Any:
        extra = {"grad_fn": grad_fn, "value": grad_fn.value(params)}
        updates, state = tx.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return step


def _follow(tx: Any, gradient: Any, params: Any, steps: int = 2) -> list[tuple[Any, Any, Any]]:
    """Shapes of parameters, state and updates before and after each step; nothing is computed."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    found = [(like, jax.eval_shape(tx.init, like), None)]
    for _ in range(steps):
        found.append(jax.eval_shape(_step(tx, gradient), *found[-1][:2]))
    return found


@pytest.mark.parametrize("case", cases.main_cases())
def test_parameters_and_gradients_of_different_dtypes(case: Case):
    """State as it was made, where plain optax's is; updates never narrower than plain optax's."""
    plain = COUNTERPARTS.get(case.factory, cases.sgd)()
    with jax.enable_x64(True):
        for own in DTYPES:
            for other in DTYPES:
                gradient = lambda p, other=other: optax.tree.cast(p, other)  # noqa: E731
                params = {"kernel": jnp.ones((2, 3), own), "scalar": jnp.ones([], own)}
                expected = _follow(plain, gradient, params)
                start, first, second = _follow(case.build(), gradient, params)
                for found, optaxs in zip((first, second), expected[1:], strict=True):
                    assert _describe(found[0]) == _describe(params)
                    narrowest, own_dtypes = _dtypes(optaxs[2]), _dtypes(params)
                    for dtype, low, param in zip(
                        _dtypes(found[2]), narrowest, own_dtypes, strict=True
                    ):
                        assert dtype in (low, jnp.promote_types(low, param)), (own, other)
                assert jax.tree.structure(start[1]) == jax.tree.structure(second[1])
                assert _describe(first[1]) == _describe(second[1])
                if _describe(expected[0][1]) == _describe(expected[1][1]):
                    assert _describe(start[1]) == _describe(first[1]), (own, other)


def _still_gradient(params: Any) -> Any:
    """The gradient of half the square norm; NaN where something moved that no gradient moves."""
    same = jnp.array(True)
    for name, value in STILL.items():
        same &= jnp.all(params[name] == value)
    grads = {name: jnp.zeros_like(value) for name, value in STILL.items()}
    return grads | {"w": jnp.where(same, params["w"], jnp.nan)}


def _loud(case: Case) -> Any:
    """The method with noise and radius of 10; decay of all weights would move integers in optax."""
    kwargs = {name: LOUD[name] for name in case.kwargs if name in LOUD and case.kwargs[name]}
    if "perturbation" in case.kwargs:
        kwargs["perturbation"] = flatopt.scale_to_norm(10.0)
    if case.factory in ("gadam", "gadamx", "pace"):
        kwargs["weight_decay"] = 0.0
    return case.build_on(lambda: optax.sgd(0.05, momentum=0.9), 0.05, **kwargs)


@pytest.mark.parametrize("case", cases.main_cases())
def test_integers_and_flags_stay_where_they_are(case: Case):
    """Also at the points where gradients are taken, and in the weights to evaluate."""
    tx, params = _loud(case), {"w": jnp.ones((2, 3)), **STILL}
    state, step = tx.init(params), jax.jit(_step(tx, _still_gradient))
    for _ in range(2):
        params, state, _ = step(params, state)
    assert bool(jnp.isfinite(params["w"]).all())
    for tree in (params, flatopt.eval_params(state, params)):
        for name, value in STILL.items():
            assert tree[name].dtype == value.dtype
            np.testing.assert_array_equal(tree[name], value)


@pytest.mark.parametrize("case", cases.main_cases())
def test_trees_with_integers_and_flags_keep_their_types(case: Case):
    # Of an optimiser whose state keeps its dtypes, so that all that changes is the method's.
    base = lambda: optax.sgd(0.05, momentum=0.9, accumulator_dtype=jnp.float32)  # noqa: E731
    params = {"w": jnp.ones((2, 3)), **STILL}
    (_, state, _), *found = _follow(case.build_on(base, 0.05), _still_gradient, params)
    if case.factory in ("gadam", "gadamx", "pace", "msam_sgd"):  # optax's own momentum inside.
        state = found[0][1]
    for after, later, updates in found:
        assert _describe(after) == _describe(params)
        assert _describe(later) == _describe(state)
        assert updates["w"].dtype == jnp.float32


def test_a_mask_counts_only_what_a_gradient_moves():
    """Else, with zeros for their Fisher information, integers would make up its empty half."""
    params = {"w": jnp.arange(1.0, 11.0), "table": jnp.arange(1000)}
    grads = {"w": params["w"], "table": jnp.zeros_like(params["table"])}
    for make in (flatopt.mask_by_fisher, flatopt.mask_at_random):
        tx = make(flatopt.scale_to_norm(1.0), sparsity=0.7, every=1)
        state = tx.init(params)
        for _ in range(3):
            moves, state = tx.update(grads, state, params)
            assert int(jnp.sum(moves["w"] != 0)) == 3


@pytest.mark.parametrize("kind", ["none", "zero", "float0"])
@pytest.mark.parametrize(
    "make", [lambda: optax.sgd(0.1), cases.sgd, lambda: optax.adam(0.1)], ids=["sgd", "mom", "adam"]
)
def test_plain_optax_trains_no_random_key(make: Any, kind: str):
    """So no method has to: the same failure, below, is enough."""
    updates = {"none": None, "zero": jnp.zeros([]), "float0": np.zeros([], jax.dtypes.float0)}
    with pytest.raises((TypeError, ValueError)):
        _train_key(make(), updates[kind])


@pytest.mark.parametrize("case", cases.main_cases())
def test_no_method_trains_a_random_key(case: Case):
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        _train_key(case.build(), None)


def _train_key(tx: Any, update: Any) -> None:
    params = {"w": jnp.ones((2, 3)), "key": jax.random.key(0)}
    _step(tx, lambda p: {"w": p["w"], "key": update})(params, tx.init(params))


def _is_average(case: Case) -> bool:
    """Not what only stands in the place of one."""
    return case.kind == "average" and case.factory != "project_to_sphere"


@pytest.mark.parametrize("case", cases.cases(average=_is_average))
def test_averages_keep_random_keys(case: Case):
    """Plain optax trains no key; an average of any collection holds them."""
    stage = getattr(flatopt, case.factory)(**case.kwargs)
    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    updates = {"w": jnp.ones(2), "key": None}
    # Begun where the updates lead: the mean of `bema` goes on along the way from there.
    state = stage.init(params | {"w": jnp.full(2, 2.0)})
    for _ in range(6):
        _, state = stage.update(updates, state, params)
    if case.factory == "snapshots":
        models, number = flatopt.snapshot_params(state)
        evaluated = jax.tree.map(lambda x: x[number - 1], models)
    else:
        evaluated = flatopt.eval_params(state, params)
    assert evaluated["key"] == params["key"]
    np.testing.assert_allclose(evaluated["w"], 2.0)


@pytest.mark.parametrize("case", cases.main_cases(no_mask=lambda c: "mask" not in c.kwargs))
def test_parameters_of_python_floats(case: Case):
    """Under jit they are arrays; the state is made of them as they are."""
    tx, params = case.build(), {"a": 1.0, "b": 2.0}
    start = tx.init(params)
    found = [(params, start, None)]
    for _ in range(2):
        found.append(jax.eval_shape(_step(tx, lambda p: p), *found[-1][:2]))
    for after, state, updates in found[1:]:
        assert _describe(after) == _describe(updates) == [("float32", ())] * 2
        assert jax.tree.structure(state) == jax.tree.structure(start)
        assert _describe(state) == _describe(start)


@pytest.mark.parametrize("case", cases.main_cases(no_mask=lambda c: "mask" not in c.kwargs))
def test_python_floats_without_jit(case: Case):
    params: Any = {"a": 1.0, "b": np.float64(2.0)}
    tx = case.build()
    params, _, _ = _step(tx, lambda p: p)(params, tx.init(params))
    assert all(bool(jnp.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("case", cases.main_cases())
def test_init_of_shapes_alone(case: Case):
    """As restoring a checkpoint or sharding a state asks for: nothing is allocated."""
    params = cases.init_params()
    shapes = jax.eval_shape(lambda: params)
    state = jax.eval_shape(case.build().init, shapes)
    assert jax.tree.structure(state) == jax.tree.structure(case.build().init(params))
    lowered = jax.jit(case.build().init).lower(shapes)
    assert _describe(lowered.out_info) == _describe(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: flatopt.alternate(optax.sgd(1e-4), flatopt.scale_to_norm(0.5)),
        lambda: flatopt.hold_perturbed(optax.sgd(1e-4), flatopt.scale_to_norm(0.5)),
        lambda: flatopt.msam(optax.sgd(1e-4, 0.9, accumulator_dtype=jnp.bfloat16), 0.5),
        lambda: flatopt.lookahead(optax.sgd(1e-4), every=2),
        lambda: flatopt.periodic_swa(optax.sgd(1e-4), period=2),
    ],
    ids=["alternate", "hold_perturbed", "msam", "lookahead", "periodic_swa"],
)
def test_single_weights_follow_half_gradients_as_exactly_as_full_ones(make: Any):
    """Rounded to a gradient's bfloat16, the way back to a point would miss it by its 2^-9."""
    start = {"w": jnp.linspace(0.9, 1.1, 50)}
    gradient = lambda p, dtype: jax.tree.map(  # noqa: E731
        lambda x: jnp.round(x).astype(dtype), p
    )
    ends = []
    for dtype in (jnp.bfloat16, jnp.float32):
        tx, params = make(), start
        state = tx.init(params)
        step = jax.jit(_step(tx, lambda p, dtype=dtype: gradient(p, dtype)))
        for _ in range(8):
            params, state, _ = step(params, state)
        ends.append(flatopt.eval_params(state, params)["w"])
    moved = float(jnp.abs(ends[1] - start["w"]).max())
    assert float(jnp.abs(ends[0] - ends[1]).max()) < 0.02 * moved
