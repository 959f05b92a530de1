"""Sparse training: the recorded runs of RigL and SET, what stays, what grows, what it costs."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import momenta
from flatopt._sparse import sparse_training as module
from flatopt._sparse.sparse_training import drop_and_grow, number_to_drop
from tests import cases
from tests.replay import (
    RTOL,
    Golden,
    assert_agrees,
    replay,
    replays,
    table,
    torch_optimizer,
)

# What a replay starts from or looks things up in, and the gradients that a mask followed from.
GIVEN = ["mask0", "grow_score", "dense_grad", "drop_fraction", "sparsity"]
GIVEN += ["update_at_step", "update_at_count"]


@replays("rigl")
def test_replays_rigl(golden: Golden) -> None:
    """One change of a mask, by the rules of the authors' optimiser."""
    recorded = json.loads(str(golden.arrays["meta"]))["cases"]
    assert recorded
    for i, case in enumerate(recorded):
        file = {k: jnp.asarray(x) for k, x in golden.tree(f"case{i}").items()}
        mask = file["mask"] != 0
        assert number_to_drop(mask.sum(), case["drop_fraction"]) == case["n_prune"]
        new = drop_and_grow(mask, file["w"], file["grad"], case["drop_fraction"])
        np.testing.assert_array_equal(new, file["new_mask"] != 0)
        np.testing.assert_array_equal(new & ~mask, file["grown"] != 0)
        # The optimiser that makes that change alone.
        tx = flatopt.sparse_training(
            optax.sgd(0.1), 0.5, start=0, fraction=case["drop_fraction"], mask=True
        )
        weights = file["w"] * mask
        state = tx.init(weights)._replace(mask=mask)
        updates, state = tx.update(file["grad"], state, weights)
        # Their variable keeps what its mask hides.
        np.testing.assert_allclose(weights + updates, file["new_w"] * new, RTOL)
        np.testing.assert_array_equal(state.mask, new)


@replays("rigl_tf2")
def test_replays_rigl_tf2(golden: Golden) -> None:
    _replay_tf2(golden)


@replays("set_tf2")
def test_replays_set_tf2(golden: Golden) -> None:
    _replay_tf2(golden)


def _replay_tf2(golden: Golden) -> None:
    """The mask changes after the step, and grows by the gradient at the new weights."""
    hyper, at = golden.hyper, golden.arrays["update_at_step"]
    last = hyper["last_update_step"]
    fractions = golden.arrays["drop_fraction"]
    if hyper["anneal"] == "cosine":
        schedule = optax.cosine_decay_schedule(hyper["drop_fraction"], last)
        np.testing.assert_allclose([schedule(t) for t in at], fractions, 1e-5, 1e-7)
    tx = flatopt.sparse_training(
        torch_optimizer(hyper, golden.learning_rate),
        hyper["sparsity"],
        distribution="uniform",
        grow="gradient" if hyper["alg"] == "rigl" else "random",
        every=hyper["frequency"],
        stop=None if last < 0 else last,
        fraction=_at(golden, at, fractions),
        order="after",
    )
    _assert_replays(golden, tx, at)


@replays("jaxpruner_rigl")
def test_replays_jaxpruner_rigl(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _replay_jaxpruner(golden, monkeypatch)


@replays("jaxpruner_set")
def test_replays_jaxpruner_set(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    _replay_jaxpruner(golden, monkeypatch)


def _replay_jaxpruner(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask changes instead of the step; jaxpruner rounds the numbers in its own way."""
    hyper, at = golden.hyper, golden.arrays["update_at_count"]
    monkeypatch.setattr(module, "number_to_drop", _jaxpruner_number_to_drop)
    first, every = hyper["update_start"], hyper["frequency"]
    schedule = optax.constant_schedule(hyper["drop_fraction"])
    if hyper["anneal"] == "cosine":
        schedule = optax.cosine_decay_schedule(hyper["drop_fraction"], hyper["update_end"])
    base = optax.adam(hyper["lr"])
    if hyper["base"] == "sgd":
        base = optax.sgd(hyper["lr"], momentum=hyper["momentum"])
    tx = flatopt.sparse_training(
        base,
        hyper["sparsity"],
        distribution=hyper["distribution"],
        grow="gradient" if hyper["alg"] == "rigl" else "random",
        start=-(-first // every) * every,  # Its counter has to be a multiple of the period.
        every=every,
        stop=hyper["update_end"],
        fraction=schedule,
    )
    shares = flatopt.erk_sparsities(golden.params, hyper["sparsity"])
    if hyper["distribution"] == "erk":
        np.testing.assert_allclose(
            [shares[k] for k in sorted(golden.tree("mask0"))],
            golden.arrays["sparsity"],
            RTOL,
            1e-12,
        )
    _assert_replays(golden, tx, at)


def _jaxpruner_number_to_drop(alive: jax.Array, fraction: Any) -> jax.Array:
    """It rounds the number that stays, half to even, and keeps one weight at least."""
    kept = jnp.round(alive * (1 - fraction)).astype(jnp.int32)
    return alive - jnp.clip(kept, 1, alive)


def _at(golden: Golden, at: Any, values: Any) -> Callable[[Any], Any]:
    """The schedule of values recorded at the updates numbered `at`."""
    whole = np.zeros((golden.steps + 1, *np.shape(values)[1:]))
    whole[at] = values
    return table(whole)


def _assert_replays(golden: Golden, tx: Any, at: Any) -> None:
    """Compares weights, masks and momenta after each step, and when the mask has changed."""
    params, start = golden.params, golden.tree("mask0")
    names = {k: k in start for k in params}
    draws = {k: _at(golden, at, x) for k, x in golden.tree("grow_score").items()}
    after = "update_at_step" in golden.arrays

    def init(params: Any) -> Any:
        state = tx.init(params)
        masks = {k: jnp.asarray(start[k] != 0) if names[k] else optax.MaskedNode() for k in params}
        return state._replace(mask=masks)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if draws:
            t = state.step + after
            zeros = optax.tree.zeros_like(params)
            extra_args["grow_scores"] = zeros | {k: draw(t) for k, draw in draws.items()}
        return tx.update(updates, state, params, **extra_args)

    def masks(state: Any) -> Any:
        return {k: m.astype(float) for k, m in state.mask.items() if names[k]}

    def momentum(state: Any) -> Any:
        return momenta.find_first(state.inner_state, params, "sparse_training")

    buffers = {"mask_t": masks, "mom": momentum}
    replayed = replay(golden, optax.GradientTransformationExtraArgs(init, update), buffers=buffers)
    assert_agrees(golden.results, replayed, ignore=GIVEN)


PARAMS = {"kernel": jnp.linspace(-1.0, 1.5, 30).reshape(5, 6), "bias": jnp.ones(6)}


def _dense_gradient(params: Any) -> Any:
    """That of a coupled quadratic: it is zero nowhere."""

    def loss(p: Any) -> jax.Array:
        return jnp.sum(jnp.sin(p["kernel"] @ p["bias"] + 1) ** 2) + 0.3 * p["kernel"].sum()

    return jax.grad(loss)(params)


def _trained(tx: Any, steps: int, params: Any = PARAMS, grad: Any = _dense_gradient) -> list[Any]:
    """Parameters and state after each update, from the sparse start on."""
    tx = optax.with_extra_args_support(tx)
    opt_state = tx.init(params)
    params = flatopt.eval_params(opt_state, params)
    run = [(params, opt_state)]

    @jax.jit
    def step(params: Any, opt_state: Any) -> Any:
        grad_fn = lambda p, i: grad(p)  # noqa: E731
        updates, opt_state = tx.update(grad(params), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        run.append(step(*run[-1]))
    return run


@pytest.mark.parametrize("grow", ["gradient", "random", None])
@pytest.mark.parametrize("order", ["instead", "before", "after"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_number_of_living_weights_never_changes(grow: str | None, order: str, sparsity: float):
    tx = flatopt.sparse_training(
        cases.sgd(), sparsity, grow=grow, order=order, every=2, fraction=0.5
    )
    masks = []
    for params, state in _trained(tx, 9):
        mask = state.mask["kernel"]
        assert mask.sum() == 30 - int(30 * sparsity)
        assert (params["kernel"][~mask] == 0).all()
        assert params["bias"].all()
        masks.append(np.asarray(mask))
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(masks)]
    # Update number 3 is the first change before a step, number 2 the first after one.
    changes = grow is not None and sparsity > 0
    due = [changes and t > 1 and t % 2 == (order != "after") for t in range(1, 10)]
    assert not any(m and not d for m, d in zip(moved, due, strict=True))
    assert any(moved) == any(due) or sparsity == 0.9  # 3 weights, of which 1 is dropped.


def test_what_is_dropped_is_smallest_and_what_grows_is_steepest():
    mask = jnp.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    weights = jnp.array([4.0, -3.0, 0.1, -0.2, 0, 0, 0, 0])
    scores = jnp.array([9.0, 9.0, 0.0, 1.0, 0.5, -2.0, 3.0, 0.1])
    new = drop_and_grow(mask, weights, scores, 0.5)
    np.testing.assert_array_equal(new, jnp.array([1, 1, 0, 0, 0, 1, 1, 0], bool))


def test_what_has_just_been_dropped_may_come_back_as_it_was():
    """It keeps its weight and its momentum; what was off before starts from zero."""
    tx = flatopt.sparse_training(
        optax.sgd(0.1, momentum=0.9), 0.5, start=2, fraction=0.5, mask=True
    )
    params = jnp.array([[4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]])
    mask = params != 0
    state = tx.init(params)._replace(mask=mask)
    for _ in range(2):
        updates, state = tx.update(jnp.ones((1, 8)), state, params)
        params = params + updates
    before, momentum = params, state.inner_state[0].trace
    np.testing.assert_allclose(momentum, 1.9 * mask)
    grads = jnp.array([[0, 0, 0, 5.0, 7.0, 0, 0, 0]])  # The smallest is steep, so is a dead one.
    updates, state = tx.update(grads, state, params)
    params = params + updates
    np.testing.assert_array_equal(state.mask, jnp.array([[1, 1, 0, 1, 1, 0, 0, 0]], bool))
    np.testing.assert_array_equal(params, before * state.mask)  # No step: weights go on or are cut.
    assert params[0, 3] > 0
    kept = state.inner_state[0].trace
    np.testing.assert_allclose(kept, momentum)  # Of the dropped one, too: it only decays.
    assert kept[0, 2] > 0
    assert kept[0, 4] == 0


@pytest.mark.parametrize("size", [8, 5000])
def test_of_equal_ones_the_lower_index_is_taken(size: int):
    mask = jnp.arange(size) < size // 2
    new = drop_and_grow(mask, jnp.ones(size), jnp.ones(size), 0.5)
    number = size // 4
    # Kept are the first, and of the others the first grow, which have just been dropped.
    np.testing.assert_array_equal(new, mask)
    scores = jnp.where(jnp.arange(size) < size // 2, 0.0, 1.0)
    new = drop_and_grow(mask, jnp.ones(size), scores, 0.5)
    expected = (jnp.arange(size) < size // 2 - number) | (
        (jnp.arange(size) >= size // 2) & (jnp.arange(size) < size // 2 + number)
    )
    np.testing.assert_array_equal(new, expected)


def test_the_number_dropped_is_cut_off_in_float32():
    numbers = [(10, 0.3, 3), (1, 0.9, 0), (19, 0.1, 1), (16, 0.3, 4), (7, 1.0, 7), (7, 2.0, 7)]
    for alive, fraction, expected in numbers:
        assert number_to_drop(jnp.int32(alive), fraction) == expected


def test_nothing_dropped_leaves_mask_and_state_alone():
    tx = flatopt.sparse_training(cases.sgd(), 0.5, every=1, fraction=0.0, order="before")
    static = flatopt.sparse_training(cases.sgd(), 0.5, grow=None)
    for (params, state), (other, other_state) in zip(
        _trained(tx, 4), _trained(static, 4), strict=True
    ):
        cases.assert_close(params, other)
        cases.assert_equal(state.mask, other_state.mask)


def test_a_sparsity_of_zero_without_changes_is_the_optimiser():
    tx = flatopt.sparse_training(cases.sgd(), 0.0, grow=None)
    cases.assert_equal(_trained(tx, 5)[-1][0], _trained(cases.sgd(), 5)[-1][0])


@pytest.mark.parametrize(
    ("order", "expected"), [("instead", 0.0), ("before", -0.3), ("after", 0.0)]
)
def test_the_first_step_of_a_new_weight(order: str, expected: float):
    """Its first gradient moves it if the step comes after the change, else it starts at zero."""
    params, mask = jnp.array([[2.0, 0.5, 0.0, 0.0]]), jnp.array([[True, True, False, False]])
    grads = jnp.array([[1.0, 0.1, 0.2, 3.0]])
    tx = flatopt.sparse_training(
        optax.sgd(0.1),
        0.5,
        start=int(order == "after"),
        every=1,
        order=order,
        fraction=0.5,
        mask=True,
    )
    state = tx.init(params)._replace(mask=mask)
    updates, state = tx.update(grads, state, params, grad_fn=lambda p, i: grads)
    np.testing.assert_array_equal(state.mask, jnp.array([[True, False, False, True]]))
    assert (params + updates)[0, 3] == pytest.approx(expected)
    assert (params + updates)[0, 1] == 0
    assert (params + updates)[0, 0] == pytest.approx(2.0 if order == "instead" else 1.9)


@pytest.mark.parametrize(("every", "steps", "expected"), [(3, 10, 3), (4, 7, 1), (50, 10, 0)])
def test_growth_at_the_new_weights_takes_a_gradient_when_it_is_due(
    every: int, steps: int, expected: int
):
    for order in ("instead", "before", "after"):
        calls: list[Any] = []
        tx = flatopt.sparse_training(cases.sgd(), 0.5, every=every, order=order)

        @jax.jit
        def step(params: Any, opt_state: Any, tx: Any = tx, calls: Any = calls) -> Any:
            def grad_fn(point: Any, i: Any) -> Any:
                jax.debug.callback(calls.append, i)
                return _dense_gradient(point)

            updates, opt_state = tx.update(
                _dense_gradient(params), opt_state, params, grad_fn=grad_fn
            )
            return optax.apply_updates(params, updates), opt_state

        carry = (PARAMS, tx.init(PARAMS))
        for _ in range(steps):
            carry = step(*carry)
        jax.block_until_ready(carry)
        jax.effects_barrier()
        assert len(calls) == (expected if order == "after" else 0)


def test_changes_end_with_stop_and_begin_with_start():
    tx = flatopt.sparse_training(cases.sgd(), 0.5, start=3, every=2, stop=5, fraction=0.5)
    masks = [np.asarray(state.mask["kernel"]) for _, state in _trained(tx, 12)]
    changed = [t for t in range(1, 13) if (masks[t] != masks[t - 1]).any()]
    assert changed == [4, 6]  # With 3 and with 5 updates made.


def test_scores_may_come_from_elsewhere():
    """Such as a gradient over many batches: it takes the place of this one."""
    tx = flatopt.sparse_training(optax.sgd(0.1), 0.5, start=0, fraction=0.5, mask=True)
    params, mask = jnp.array([[2.0, 0.5, 0.0, 0.0]]), jnp.array([[True, True, False, False]])
    state = tx.init(params)._replace(mask=mask)
    grads, scores = jnp.array([[0.0, 0, 0, 9]]), jnp.array([[0.0, 0, 9, 0]])
    for given, expected in ((None, [1, 0, 0, 1]), (scores, [1, 0, 1, 0])):
        _, new = tx.update(grads, state, params, grow_scores=given)
        np.testing.assert_array_equal(new.mask[0], np.array(expected, bool))


def test_sam_inside_climbs_among_the_living_weights():
    tx = flatopt.sparse_training(optax.chain(flatopt.sam(0.5), optax.sgd(0.1)), 0.5, grow=None)
    opt_state = tx.init(PARAMS)
    params = flatopt.eval_params(opt_state, PARAMS)
    points: list[Any] = []

    def grad_fn(point: Any, _: Any) -> Any:
        points.append(point)
        return _dense_gradient(point)

    tx.update(_dense_gradient(params), opt_state, params, grad_fn=grad_fn)
    (point,) = points
    assert (point["kernel"][~opt_state.mask["kernel"]] == 0).all()
    length = optax.tree.norm(optax.tree.sub(point, params))
    np.testing.assert_allclose(length, 0.5, rtol=1e-5)
    # Outside, it climbs along the whole gradient, and the perturbed network is dense.
    points.clear()
    outside = optax.chain(flatopt.sam(0.5), flatopt.sparse_training(optax.sgd(0.1), 0.5, grow=None))
    outside.update(_dense_gradient(params), outside.init(PARAMS), params, grad_fn=grad_fn)
    assert (points[0]["kernel"] != 0).all()


def test_sam_before_it_trains_a_sparse_network():
    tx = optax.chain(flatopt.sam(0.05), flatopt.sparse_training(cases.sgd(), 0.5, every=2))
    for params, state in _trained(tx, 6):
        assert state[1].mask["kernel"].sum() == 15
        assert (params["kernel"][~state[1].mask["kernel"]] == 0).all()
    assert jnp.count_nonzero(params["kernel"]) == 15  # Those that grew have taken a step.


@pytest.mark.parametrize("inside", [False, True])
def test_an_average_is_cut_to_the_mask(inside: bool):
    average = flatopt.swa()
    inner = optax.chain(cases.sgd(), average) if inside else cases.sgd()
    tx = flatopt.sparse_training(inner, 0.5, every=2, fraction=0.5)
    tx = tx if inside else optax.chain(tx, average)
    run = _trained(tx, 8)  # Those that grew in the seventh have taken a step.
    params, state = run[-1]
    sparse = state if inside else state[0]
    evaluated = flatopt.eval_params(state, params)
    assert jnp.count_nonzero(evaluated["kernel"]) == 15
    assert ((evaluated["kernel"] != 0) == sparse.mask["kernel"]).all()
    if not inside:
        mean = sum(p["kernel"] for p, _ in run[1:]) / 8
        np.testing.assert_allclose(evaluated["kernel"], mean * sparse.mask["kernel"], rtol=1e-5)
        assert jnp.count_nonzero(state[1].mean["kernel"]) > 15  # Of several masks: it is denser.


def test_two_averages_on_one_level_are_still_refused():
    tx = optax.chain(
        flatopt.sparse_training(cases.sgd(), 0.5), flatopt.swa(), flatopt.params_ema(0.9)
    )
    with pytest.raises(ValueError, match="twice on one level"):
        flatopt.eval_params(tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("order", ["instead", "before", "after"])
@pytest.mark.parametrize("due", [False, True])
def test_what_is_not_finite_shows_behind_the_mask(bad: float, order: str, due: bool):
    tx = flatopt.sparse_training(
        optax.adam(0.1), 0.5, every=1 if due else 9, order=order, start=None
    )
    params, state = _trained(tx, 1)[-1]
    dead = jnp.argwhere(~state.mask["kernel"])[0]
    grads = jax.tree.map(jnp.ones_like, params)
    grads["kernel"] = grads["kernel"].at[tuple(dead)].set(bad)
    updates, new = tx.update(grads, state, params, grad_fn=lambda p, i: grads)
    assert not jnp.isfinite(updates["kernel"]).all()
    assert new.mask["kernel"].sum() == 15


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_numbers_are_in_order(scale: float):
    mask = jnp.array([1, 1, 0, 0], bool)
    weights, scores = scale * jnp.array([2.0, 1, 0, 0]), scale * jnp.array([0, 0, 1.0, 2])
    new = drop_and_grow(mask, weights, scores, 0.5)
    np.testing.assert_array_equal(new, jnp.array([1, 0, 0, 1], bool))


def test_a_tree_says_the_sparsity_of_each_leaf():
    params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10)), "c": jnp.ones(10), "d": None}
    tree = {"a": 0.9, "b": None, "c": 0.5, "d": None}
    mask = flatopt.sparse_training(optax.sgd(0.1), None, distribution=tree).init(params).mask
    assert mask["a"].sum() == 10
    assert mask["c"].sum() == 5
    assert isinstance(mask["b"], optax.MaskedNode)
    chosen = flatopt.sparse_training(
        optax.sgd(0.1), 0.5, mask={"a": True, "b": False, "c": True, "d": None}
    )
    assert jax.tree.leaves(chosen.init(params).mask)[0].sum() < 100
    assert len(jax.tree.leaves(chosen.init(params).mask)) == 2


def test_wrong_arguments_say_so():
    make = flatopt.sparse_training
    for kwargs, message in [
        ({"sparsity": 1.0}, r"sparsity=1.0 is out of range"),
        ({"fraction": 1.5}, r"fraction=1.5 is out of range"),
        ({"grow": "weights"}, "grow='weights' must be one of gradient, random"),
        ({"order": "never"}, "order='never' must be one of instead, before, after"),
        ({"distribution": "normal"}, "distribution='normal' must be one of erk, uniform"),
        ({"distribution": None}, "distribution=None must be one of"),
        ({"distribution": {"a": 2.0}}, "sparsity=2.0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"start": -1}, "start=-1 is out of range"),
        ({"stop": -1}, "stop=-1 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**({"optimizer": optax.sgd(0.1), "sparsity": 0.5} | kwargs))
    with pytest.raises(TypeError, match="must be an optax transformation"):
        make(0.1, 0.5)
