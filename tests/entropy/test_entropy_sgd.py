"""Entropy-SGD in its published forms."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._entropy import entropy_sgd, local_entropy
from tests import cases
from tests.replay import Array, Golden, assert_agrees, replay, replays


# Entropy-SGD
@pytest.mark.parametrize("form", ["python", "lua", "pittorino"])
def test_recipe_is_its_pieces(form: str):
    """The inner loop of the form, then SGD with or without momentum and decay."""
    inner_step, initial, outer = {
        "python": (local_entropy.momentum_step, False, True),
        "lua": (entropy_sgd.lua_step, False, False),
        "pittorino": (entropy_sgd.pittorino_step, True, True),
    }[form]
    common = {"noise": 0.01, "momentum": 0.5, "weight_decay": 0.01, "key": 7}
    recipe = flatopt.entropy_sgd(0.3, 4, 0.2, form=form, scale_by_gamma=False, **common)
    inner = flatopt.local_entropy(4, 0.2, inner_step=inner_step, initial_gradient=initial, **common)
    if outer:
        rest = optax.chain(
            optax.add_decayed_weights(0.01), optax.sgd(0.3, momentum=0.5, nesterov=True)
        )
    else:
        rest = optax.sgd(0.3)
    pieces = optax.chain(inner, rest)
    params, _ = cases.run(recipe, steps=1)
    expected, _ = cases.run(pieces, steps=1)
    if form == "python":  # Its outer buffer starts from the first gradient of the loss.
        seed = jax.grad(cases.loss_fn)(cases.init_params(), cases.make_batch())
        expected = optax.tree.add_scale(expected, -0.3 * 0.5**2, seed)
    cases.assert_close(params, expected)
    if form != "python":
        cases.assert_close(cases.run(recipe)[0], cases.run(pieces)[0])


def test_published_form_without_inner_steps_is_sgd():
    tx = flatopt.entropy_sgd(0.05, 0, 0.1, form="pittorino", momentum=0.9, scale_by_gamma=False)
    expected, _ = cases.run(optax.sgd(0.05, momentum=0.9, nesterov=True))
    cases.assert_close(cases.run(tx)[0], expected)


def test_unknown_form():
    with pytest.raises(ValueError, match="form='c' must be one of python, lua, pittorino"):
        flatopt.entropy_sgd(0.1, 5, 0.1, form="c")


def test_a_wrong_inner_momentum_is_named_so():
    with pytest.raises(ValueError, match=r"^inner_momentum=1\.5 is out of range"):
        flatopt.entropy_sgd(0.1, 5, 0.1, inner_momentum=1.5)


@pytest.mark.parametrize("knob", [{"nesterov": False}, {"dampening": 0.1}])
@pytest.mark.parametrize("form", ["lua", "pittorino"])
def test_knobs_that_a_program_does_not_have(form: str, knob: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(knob))}=.*only form='python'"):
        flatopt.entropy_sgd(0.1, 5, 0.1, form=form, **knob)
    flatopt.entropy_sgd(0.1, 5, 0.1, form="python", **knob)


class _Mean(NamedTuple):
    """State of the recorder: the mean of the inner loop that has just ended."""

    mean: optax.Params


def _keep_mean() -> optax.GradientTransformationExtraArgs:
    """Stands behind `local_entropy`, whose unscaled result is `params - mean`, and keeps it."""

    def update(updates: Any, state: _Mean, params: Any = None, **extra_args: Any) -> Any:
        del state, extra_args
        return updates, _Mean(jax.tree.map(jnp.subtract, params, updates))

    return optax.GradientTransformationExtraArgs(lambda p: _Mean(jax.tree.map(jnp.copy, p)), update)


def _means_along(
    golden: Golden, inner: optax.GradientTransformationExtraArgs, extra_batch: Any
) -> dict[str, Array]:
    """The mean of each inner loop, run by itself along the recorded trajectory."""
    trajectory = {k: jnp.asarray(v) for k, v in golden.tree("traj").items()}

    def follow(count: Any) -> Any:
        return jax.tree.map(lambda x: x[count + 1] - x[count], trajectory)

    def jump(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        del updates, params
        return follow(state), state + 1

    along = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros([], jnp.int32), jump)
    tx = optax.chain(inner, _keep_mean(), along)
    replayed = replay(golden, tx, extra_batch=extra_batch, buffers={"mu": lambda s: s[1].mean})
    return {k: v for k, v in replayed.items() if k.startswith("mu/")}


def _recorded_noise(golden: Golden) -> float | optax.GradientTransformation:
    """The recorded standard normal draws, in the official scale."""
    eps, draws = float(golden.hyper.get("eps", 0.0)), golden.tree("eta")
    if not draws:
        assert eps == 0
        return 0.0
    rate = 0.1  # A constant of the official code.

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Any, inner_step: Any, **_: Any
    ) -> Any:
        del params
        scale = rate * eps / np.sqrt(0.5 * rate)
        kicks = {k: jnp.asarray(v)[step, inner_step] for k, v in draws.items()}
        return jax.tree.map(lambda u, xi: u - scale * xi, updates, kicks), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _start(golden: Golden) -> dict[str, Array]:
    """Without an inner loop the recorded mean is the point where it would have begun."""
    return {f"mu/{k}": v[:-1] for k, v in golden.tree("traj").items()}


@replays("entropy_sgd")
def test_replays(golden: Golden) -> None:
    """The authors' PyTorch program. `g1` is ignored there, so gamma is constant here."""
    hyper = golden.hyper
    momentum = float(hyper["momentum"])
    common: dict[str, Any] = {
        "num_steps": int(hyper["L"]),
        "gamma": hyper["g0"],
        "noise": _recorded_noise(golden),
        "momentum": momentum,
        "weight_decay": hyper["weight_decay"],
    }
    nesterov = bool(hyper["nesterov"])
    # Dampening is part of the momentum there: without the one there is not the other.
    damp = hyper["damp"] if momentum else 0.0
    tx = flatopt.entropy_sgd(golden.learning_rate, nesterov=nesterov, dampening=damp, **common)
    replayed = replay(golden, tx, extra_batch=lambda t, i: (t, i + 1))
    step = local_entropy.momentum_step if nesterov else entropy_sgd.heavy_ball_step
    step = functools.partial(step, damp=damp)
    inner = flatopt.local_entropy(inner_step=step, initial_gradient=False, **common)
    means = _means_along(golden, inner, lambda t, i: (t, i + 1)) if hyper["L"] else _start(golden)
    assert_agrees(golden.results, replayed | means, ignore=("eta",))  # The draws are an input.


@replays("entropy_sgd_lua")
def test_replays_entropy_sgd_lua(golden: Golden) -> None:
    """The authors' Lua program: the exponent of the scoping is 1 at the first update."""
    hyper = golden.hyper
    first = hyper["gamma"] * (1 + hyper["scoping"])
    gamma = flatopt.exponential_scoping(first, hyper["scoping"])
    common: dict[str, Any] = {
        "num_steps": int(hyper["L"]),
        "gamma": gamma,
        "noise": 0.0,
        "momentum": hyper["momentum"],
        "weight_decay": hyper["weight_decay"],
    }
    tx = flatopt.entropy_sgd(golden.learning_rate, form="lua", **common)
    replayed = replay(golden, tx, extra_batch=lambda t, i: (t, i + 1))
    inner = flatopt.local_entropy(inner_step=entropy_sgd.lua_step, initial_gradient=False, **common)
    replayed |= _means_along(golden, inner, lambda t, i: (t, i + 1))
    replayed["gamma_t"] = np.asarray([gamma(t) for t in range(golden.steps)])
    assert_agrees(golden.results, replayed)


@replays("esgd_sacreddnn")
def test_replays_esgd_sacreddnn(golden: Golden) -> None:
    """Entropic SGD of Pittorino et al."""
    hyper = golden.hyper
    gamma = flatopt.exponential_scoping(hyper["g0"], hyper["g1"])
    tx = flatopt.entropy_sgd(
        golden.learning_rate,
        int(hyper["L"]),
        gamma,
        form="pittorino",
        noise=0.0,
        momentum=hyper["momentum"],
        inner_momentum=hyper["momentum_sgld"],
        inner_learning_rate=hyper["sgld_lr"],
        weight_decay=hyper["weight_decay"],
        scale_by_gamma=bool(hyper["gscale"]),
    )
    replayed = replay(golden, tx, extra_batch=lambda t, i: (t, i + 1))
    replayed["g_t"] = np.asarray([gamma(t) for t in range(golden.steps)])
    assert_agrees(golden.results, replayed)
