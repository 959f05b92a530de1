"""Sparse training: the recorded runs of RigL and SET, what stays, what grows, what it costs."""

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
