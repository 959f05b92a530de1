"""Rebuilds the problem of a recorded trajectory and replays an optimiser on it.

A test of a method's recorded runs stands beside its other tests:

    @replays("sam")
    def test_replays(golden: Golden): ...

It runs once for each file of the method in the folder that FLATOPT_GOLDEN_DIR names (by default
`tests/golden`, whose README describes the files), in float64, under the marker `golden` and an id
that holds the file's name. It reads its hyperparameters from the file, so that files with other
seeds, shapes, lengths and hyperparameters replay too.

`replay` returns arrays under the names that the files use, so that `assert_agrees` can compare a
replay, or a recursion written by hand, with a file field by field.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt

RTOL, ATOL = 1e-9, 1e-11
OWN_FOLDER = pathlib.Path(__file__).parent / "golden"
FOLDER = pathlib.Path(os.environ.get("FLATOPT_GOLDEN_DIR", OWN_FOLDER))

Array = np.ndarray[Any, np.dtype[Any]]
Params = dict[str, jax.Array]
LossFn = Callable[..., jax.Array]
# (step, number of the extra evaluation) -> (step, number) of the batch that it uses
ExtraBatch = Callable[[Any, Any], tuple[Any, Any]]
ExtraGrad = Callable[[Params, Params, tuple[jax.Array, ...]], Params]
Buffers = Mapping[str, Callable[[optax.OptState], optax.Params]]

# Fields that a replay starts from or looks things up in. Whatever else a file holds is a result,
# and is compared.
_INPUTS = frozenset(
    {
        "meta",
        "p0",
        "H",
        "theta_star",
        "X",
        "Y",
        "batch_idx",
        "rho_t",
        "lr_t",
        "lr_per_epoch",
        "lr_list",
        "note_epoch",
        "z",
        "mask",
        "avg_at_step",
        "avg_at_epoch",
        "avg_after_epoch",
    }
)


def replays(method: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test with an argument `golden` run over every recorded file of `method`."""

    def mark(path: pathlib.Path) -> Any:
        # Files of the full-batch problem count as extra: only their data differ from the others.
        extra = FOLDER == OWN_FOLDER and "__mlp_full__" in path.name
        return pytest.param(path, id=path.name, marks=[pytest.mark.exhaustive] if extra else [])

    paths = [mark(path) for path in sorted(FOLDER.glob(f"{method}__*.npz"))]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.golden(pytest.mark.parametrize("golden", paths, indirect=True)(test))

    return decorate


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded trajectory.

    Attributes:
      name: name of the file.
      method: the method's name, from the file's own description.
      hyper: its hyperparameters, under the names of the official code.
      steps: number of optimiser steps.
      arrays: every array of the file.
    """

    name: str
    method: str
    hyper: dict[str, Any]
    steps: int
    arrays: dict[str, Array]

    @property
    def params(self) -> Params:
        """The initial parameters, a flat dict under the names of the official code."""
        return {k: jnp.asarray(v) for k, v in self.tree("p0").items()}

    def tree(self, field: str) -> dict[str, Array]:
        """The arrays `field/<parameter>` as a flat dict."""
        prefix = f"{field}/"
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    @property
    def epoch_len(self) -> int:
        """Number of steps in an epoch."""
        return int(self.hyper["epoch_len"] if "epoch_len" in self.hyper else self.hyper["steps"])

    @property
    def learning_rate(self) -> optax.ScalarOrSchedule:
        """The learning rate: the recorded one of each step or epoch, else the hyperparameter."""
        if "lr_t" in self.arrays:
            return table(self.arrays["lr_t"])
        if "lr_per_epoch" in self.arrays:
            return table(np.repeat(self.arrays["lr_per_epoch"], self.epoch_len))
        return float(self.hyper["lr"])

    @property
    def results(self) -> dict[str, Array]:
        """What a replay must reproduce, with `eval/`: the weights to evaluate after each step."""
        found = {k: v for k, v in self.arrays.items() if k.split("/")[0] not in _INPUTS}
        for name, trajectory in self.tree("traj").items():
            evaluated = found.pop(f"unpert/{name}", trajectory)
            average = found.pop(f"avg/{name}", None)
            if average is not None:
                # The average stands still between two updates; before the first there is none.
                number = np.searchsorted(self._average_steps(), np.arange(len(trajectory)), "right")
                shape = (-1, *[1] * (trajectory.ndim - 1))
                held = average[np.maximum(number - 1, 0)] if len(average) else trajectory
                evaluated = np.where((number > 0).reshape(shape), held, trajectory)
            found[f"eval/{name}"] = evaluated
        return found

    def _average_steps(self) -> Array:
        """Numbers of the steps, from 1, after which the average was updated."""
        if "avg_at_step" in self.arrays:
            return self.arrays["avg_at_step"]
        for field in ("avg_at_epoch", "avg_after_epoch"):
            if field in self.arrays:
                return self.arrays[field] * self.epoch_len
        return np.arange(1, self.steps + 1)


def load(path: pathlib.Path) -> Golden:
    """Reads one file."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    return Golden(
        name=path.name,
        method=meta.get("method", path.name.split("__")[0]),
        hyper=meta.get("hyper") or {},
        steps=int(meta.get("T") or 0),
        arrays=arrays,
    )


# Compilation is most of the time of a replay; optimised code would not repay its own.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def quad_loss(params: Params, hessian: jax.Array, minimum: jax.Array) -> jax.Array:
    """Quadratic of the two tensors together."""
    theta = jnp.concatenate([params["layer1.weight"].ravel(), params["layer2.bias"].ravel()])
    return 0.5 * (theta - minimum) @ hessian @ (theta - minimum)


def logits(params: Params, x: jax.Array) -> jax.Array:
    """One hidden tanh layer; weights are (out, in)."""
    hidden = jnp.tanh(x @ params["fc1.weight"].T + params["fc1.bias"][None, :])
    return hidden @ params["fc2.weight"].T + params["fc2.bias"][None, :]


def mlp_losses(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def mlp_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return jnp.mean(mlp_losses(params, x, y))


def problem(golden: Golden) -> tuple[LossFn, Callable[[Any, Any], tuple[jax.Array, ...]]]:
    """The loss, and the function from step and number to the batch: its other arguments."""
    if "H" in golden.arrays:
        data = tuple(jnp.asarray(golden.arrays[key]) for key in ("H", "theta_star"))
        return quad_loss, lambda t, k: data
    data = tuple(jnp.asarray(golden.arrays[key]) for key in ("X", "Y"))
    if "batch_idx" not in golden.arrays:
        return mlp_loss, lambda t, k: data
    rows = jnp.asarray(golden.arrays["batch_idx"])
    return mlp_loss, lambda t, k: tuple(x[rows[t, k]] for x in data)


def table(values: Any) -> optax.Schedule:
    """The schedule that looks its value up by the step count."""
    return lambda count: jnp.asarray(values)[count]


def torch_optimizer(
    hyper: Mapping[str, Any],
    learning_rate: optax.ScalarOrSchedule,
    base: str = "sgd",
) -> optax.GradientTransformationExtraArgs:
    """The base optimiser in PyTorch's convention.

    The gradient of L2 decay joins the loss gradient (SGD, Adam); AdamW decays the weights before
    the step, by `lr * wd * w`. Adam's epsilon stands outside the root of the bias-corrected second
    moment, as in optax. Momentum 0 keeps a trace: the last gradient.
    """
    decay = float(hyper.get("weight_decay", hyper.get("wd", 0.0)))
    b1, b2 = hyper.get("betas", (0.9, 0.999))
    eps = float(hyper.get("eps", 1e-8))
    if base == "sgd":
        momentum, nesterov = float(hyper.get("momentum", 0.0)), bool(hyper.get("nesterov", False))
        optimizer = optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)
    elif base == "adam":
        optimizer = optax.adam(learning_rate, b1, b2, eps)
    elif base == "adamw":
        return optax.adamw(learning_rate, b1, b2, eps, weight_decay=decay)
    else:
        raise ValueError(f"base={base!r} is none of sgd, adam, adamw.")
    return optax.chain(optax.add_decayed_weights(decay), optimizer)


def decay_after_step(
    learning_rate: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """Decays the weights AFTER the step that the updates describe: `(w + u) * (1 - lr * wd)`."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        keep = 1 - learning_rate * weight_decay
        return jax.tree.map(lambda u, w: (w + u) * keep - w, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def replay(
    golden: Golden,
    tx: optax.GradientTransformation,
    *,
    loss_fn: LossFn | None = None,
    extra_batch: ExtraBatch = lambda t, i: (t, 0),
    extra_grad: ExtraGrad | None = None,
    buffers: Buffers | None = None,
) -> dict[str, Array]:
    """Runs `tx` on the file's problem, and returns what it records under the files' names.

    Args:
      golden: the recorded trajectory.
      tx: the optimiser.
      loss_fn: loss in place of the problem's own.
      extra_batch: which batch the extra gradient number i of step t is taken on.
      extra_grad: the extra gradient, from the parameters, the point and the batch; None means that
        of the loss at the point.
      buffers: further fields, each a function from the optimiser's state after a step.

    Returns:
      `traj/`, `eval/`, `loss`, `grad0/`, the fields of `buffers`, and, where the file has it,
      `pert/`: the points of all extra gradients, in order, without those of Hessian products.
    """
    tx = optax.with_extra_args_support(tx)
    own_loss, batch = problem(golden)
    value_and_grad = jax.value_and_grad(loss_fn or own_loss)
    record = bool(golden.tree("pert"))
    all_points: list[Params] = []

    def record_point(halves: Params) -> None:
        whole = {k: np.ascontiguousarray(v).view(np.float64)[..., 0] for k, v in halves.items()}
        all_points.append(whole)

    @compiled
    def step(params: Params, opt_state: Any, t: jax.typing.ArrayLike) -> tuple[Any, ...]:
        def grad_fn(point: Params, i: Any) -> Params:
            if record and not _is_differentiated(point):
                # From within a loop too. As halves, for callbacks do not know of float64.
                halves = jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32), point)
                jax.debug.callback(record_point, halves, ordered=True)
            data = batch(*extra_batch(t, i))
            if extra_grad is not None:
                return extra_grad(params, point, data)
            return value_and_grad(point, *data)[1]

        grad_fn.value = lambda point: value_and_grad(point, *batch(t, 0))[0]
        loss, grads = value_and_grad(params, *batch(t, 0))
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        kept = {field: get(opt_state) for field, get in (buffers or {}).items()}
        evaluation = flatopt.eval_params(opt_state, params)
        return params, opt_state, evaluation, loss, grads, kept

    params = golden.params
    opt_state = tx.init(params)
    first: Params = {}
    losses: list[jax.Array] = []
    kept_by_step: list[dict[str, Params]] = []
    trajectory, evaluated = [params], [flatopt.eval_params(opt_state, params)]
    for t in range(golden.steps):
        params, opt_state, evaluation, loss, grads, kept = step(params, opt_state, t)
        first = first or grads
        losses.append(loss)
        trajectory.append(params)
        evaluated.append(evaluation)
        kept_by_step.append(kept)

    jax.effects_barrier()
    result: dict[str, Array] = {"loss": np.asarray(losses)}
    result |= {f"grad0/{name}": np.asarray(grad) for name, grad in first.items()}
    series: dict[str, list[Params]] = {"traj": trajectory, "eval": evaluated, "pert": all_points}
    series |= {field: [kept[field] for kept in kept_by_step] for field in buffers or {}}
    for field, trees in series.items():
        result |= _stack(field, trees)
    return result


def assert_agrees(
    desired: Mapping[str, Array], actual: Mapping[str, Array], ignore: Collection[str] = ()
) -> None:
    """Asserts that `actual` holds every field of `desired`, with the same numbers.

    `ignore` names fields that say nothing about the optimiser; no other field goes uncompared.
    """
    desired = {k: v for k, v in desired.items() if k.split("/")[0] not in ignore}
    missing = sorted(set(desired) - set(actual))
    assert not missing, f"recorded, but not replayed: {missing}"
    assert any(k.startswith("traj/") for k in desired), "the file holds no trajectory"
    for key, value in desired.items():
        assert actual[key].shape == value.shape, f"{key}: {actual[key].shape} != {value.shape}"
        np.testing.assert_allclose(actual[key], value, RTOL, ATOL, err_msg=key)


def _is_differentiated(point: Params) -> bool:
    """Whether a derivative of the gradient is taken there, as for products with the Hessian."""
    tracers = jax.interpreters.ad.JVPTracer
    return any(isinstance(x, tracers) for x in jax.tree.leaves(point))


def _stack(field: str, trees: list[Params]) -> dict[str, Array]:
    """The trees of successive steps as arrays `field/<parameter>` with the steps in front."""
    names = trees[0] if trees else {}
    return {f"{field}/{k}": np.stack([np.asarray(tree[k]) for tree in trees]) for k in names}


def assert_sam_agrees(golden: Golden, tx: optax.GradientTransformation) -> None:
    """Compares all; with radius 0 flatopt takes no second gradient, and the file's is at `w`."""
    replayed = replay(golden, tx)
    results = golden.results
    if golden.hyper["rho"] == 0:
        assert not any(key.startswith("pert/") for key in replayed)
        replayed |= {f"pert/{name}": x[:-1] for name, x in golden.tree("traj").items()}
    assert_agrees(results, replayed)


def adamw_decaying_after(golden: Golden) -> optax.GradientTransformation:
    """The AdamW of the Momentum-SAM authors, which decays after the step."""
    hyper, rate = golden.hyper, golden.hyper["lr"]
    adam = torch_optimizer(hyper | {"weight_decay": 0.0}, rate, "adam")
    return optax.chain(adam, decay_after_step(rate, hyper["weight_decay"]))


def replay_replicas(
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


def recorded_noise(golden: Golden) -> optax.GradientTransformation:
    """The recorded draws, one a step."""
    draws = {name: jnp.asarray(z) for name, z in golden.tree("z").items()}

    def update(updates: Any, step: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del updates, params
        return {name: z[step] for name, z in draws.items()}, step + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)
