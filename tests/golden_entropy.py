"""Adapters: how each recorded method of local entropy and of replicas is built from flatopt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import (
    Array,
    Golden,
    assert_agrees,
    compiled,
    problem,
    replay,
    torch_optimizer,
)


class _Mean(NamedTuple):
    """State of the recorder: the mean of the inner loop that has just ended."""

    mean: optax.Params


def _keep_mean() -> optax.GradientTransformationExtraArgs:
    """Stands behind `local_entropy`, whose unscaled result is `params - mean`, and keeps it."""

    def update(updates: Any, state: _Mean, params: Any = None, **extra_args: Any) -> Any:
        del state, extra_args
        return updates, _Mean(jax.tree.map(jnp.subtract, params, updates))

    return optax.GradientTransformationExtraArgs(lambda p: _Mean(jax.tree.map(jnp.copy, p)), update)


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


def replay_entropy_sgd(golden: Golden) -> None:
    """The authors' PyTorch program. `g1` is ignored there, so gamma is constant here."""
    hyper = golden.hyper
    momentum = float(hyper["momentum"])
    common: dict[str, Any] = {
        "num_steps": int(hyper["L"]),
        "gamma": hyper["g0"],
        "noise": _recorded_noise(golden),
        "nesterov": bool(hyper["nesterov"]),
        # Dampening is part of the momentum there: without the one there is not the other.
        "dampening": hyper["damp"] if momentum else 0.0,
        "weight_decay": hyper["weight_decay"],
    }
    tx = flatopt.entropy_sgd(golden.learning_rate, momentum=momentum, form="python", **common)
    replayed = replay(golden, tx, extra_batch=lambda t, i: (t, i + 1))
    over = "decay" if hyper["nesterov"] else "noise"
    inner = flatopt.local_entropy(
        momentum=momentum, momentum_over=over, initial_gradient=False, **common
    )
    means = _means_along(golden, inner, lambda t, i: (t, i + 1)) if hyper["L"] else _start(golden)
    assert_agrees(golden.results, replayed | means, ignore=("eta",))  # The draws are an input.


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


def _start(golden: Golden) -> dict[str, Array]:
    """Without an inner loop the recorded mean is the point where it would have begun."""
    return {f"mu/{k}": v[:-1] for k, v in golden.tree("traj").items()}


def replay_entropy_sgd_lua(golden: Golden) -> None:
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
    inner = flatopt.local_entropy(momentum_over="gradient", initial_gradient=False, **common)
    replayed |= _means_along(golden, inner, lambda t, i: (t, i + 1))
    replayed["gamma_t"] = np.asarray([gamma(t) for t in range(golden.steps)])
    assert_agrees(golden.results, replayed)


def replay_esgd_sacreddnn(golden: Golden) -> None:
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


def _replay_replicas(
    golden: Golden, tx: optax.GradientTransformation, updates_per_step: int = 1
) -> dict[str, Array]:
    """Trains the recorded replicas along a leading axis; replica a of n sees batch `l n + a`.

    Or, where several updates make a recorded step, batch `a L + l` in update l of L.
    """
    tx = optax.with_extra_args_support(tx)
    loss_fn, batch = problem(golden)
    start = {k: jnp.asarray(v[0]) for k, v in golden.tree("traj").items()}
    number = len(next(iter(start.values())))
    replicas = jnp.arange(number)

    @compiled
    def step(params: Any, opt_state: Any, t: Any) -> Any:
        first: Any = None
        for inner in range(updates_per_step):
            grads = jax.vmap(
                lambda p, a, inner=inner: jax.grad(loss_fn)(
                    p, *batch(t, a * updates_per_step + inner)
                )
            )(params, replicas)
            first = grads if first is None else first
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state, first

    params, opt_state, trajectory, gradients = start, tx.init(start), [start], []
    for t in range(golden.steps):
        params, opt_state, grads = step(params, opt_state, t)
        trajectory.append(params)
        gradients.append(grads)
    result = {f"grad0/{k}": np.asarray(v[0]) for k, v in gradients[0].items()}
    for name in params:
        result[f"traj/{name}"] = np.stack([p[name] for p in trajectory])
        centres = [flatopt.barycentre(p)[name] for p in trajectory]
        result[f"master/{name}"] = np.stack(centres[1:])
    # A replica has no weights to evaluate but its own.
    return result | {k.replace("traj/", "eval/"): v for k, v in result.items() if "traj/" in k}


def replay_rsgd(golden: Golden) -> None:
    """The penalty is `g |w - mean|^2`, without the half.

    The loss there is the mean over y replicas, and the learning rate y times as large to make up
    for it: that also multiplies the decay, which had not been divided.
    """
    hyper = golden.hyper
    decay = hyper["y"] * hyper["weight_decay"]
    strength = flatopt.exponential_scoping(2 * hyper["g"], hyper["grate"], every=golden.epoch_len)
    optimizer = torch_optimizer(
        {**hyper, "nesterov": True, "weight_decay": decay}, golden.learning_rate
    )
    tx = optax.chain(flatopt.couple_replicas(strength), optimizer)
    replayed = _replay_replicas(golden, tx)
    replayed["g_t"] = np.asarray([strength(t) / 2 for t in range(golden.steps)])
    # The penalty of each step, from its weights.
    points = [v[:-1] for k, v in replayed.items() if k.startswith("traj/")]
    squares = [((x - x.mean(1, keepdims=True)) ** 2).reshape(*x.shape[:2], -1) for x in points]
    replayed["coupling_loss"] = replayed["g_t"] * sum(s.sum(-1) for s in squares).mean(1)
    assert_agrees(golden.results, replayed)


def replay_parle(golden: Golden) -> None:
    """The official counter advances by the number of tensors in each inner step: kept in here.

    Its period is that of the scoping, so gamma and rho grow so many times faster than the paper
    says; to flatopt they are schedules, and which one is the caller's affair.
    """
    hyper = golden.hyper
    number, length, tensors = int(hyper["n"]), int(hyper["L"]), len(golden.params)
    growth = 1 + 0.5 / hyper["nb"]

    def scoped(init_value: float, most: float, ahead: int) -> optax.Schedule:
        return lambda t: jnp.minimum(
            init_value * growth ** ((tensors * (t + ahead)) // length), most
        )

    gamma = scoped(hyper["gamma"], 1.0, ahead=0)
    # After the inner steps, at a synchronisation, the counter has gone on.
    rho = scoped(hyper["rho"] * length * number, 10.0, ahead=1)
    tx = flatopt.parle(golden.learning_rate, gamma, rho, every=length)
    replayed = _replay_replicas(golden, tx, updates_per_step=length)
    replayed["gamma_t"] = np.asarray([gamma(t) for t in range(golden.steps * length)])
    assert_agrees(golden.results, replayed)


def replay_dpsgd(golden: Golden) -> None:
    """Mixing with the recorded matrix, which a topology of flatopt's must make too."""
    hyper, matrix = golden.hyper, golden.arrays["W"]
    if hyper["topology"] in ("ring", "exponential"):
        own = flatopt.mixing_matrix(hyper["topology"], int(hyper["n"]))
        np.testing.assert_allclose(own, matrix, rtol=1e-6)  # It is in float32 there.
    tx = flatopt.gossip(torch_optimizer(hyper, golden.learning_rate), matrix)
    assert_agrees(golden.results, _replay_replicas(golden, tx), ignore=("W",))  # An input.


ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "entropy_sgd": replay_entropy_sgd,
    "entropy_sgd_lua": replay_entropy_sgd_lua,
    "esgd_sacreddnn": replay_esgd_sacreddnn,
    "rsgd": replay_rsgd,
    "parle": replay_parle,
    "dpsgd": replay_dpsgd,
}
