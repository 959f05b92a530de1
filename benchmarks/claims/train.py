"""Training of many settings and many seeds as one mapped, scanned, compiled program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from benchmarks.claims.task import Task

STATISTICS_BATCHES = 100  # BatchNorm's running statistics forget their start within so many.


class Arm(NamedTuple):
    """A way to train.

    Attributes:
      name: of the arm.
      make: `make(hypers, steps)`, the optimiser; the hyperparameters are traced scalars.
      grads_per_step: gradient evaluations of an update, on average.
      grid: the tried values of each hyperparameter.
    """

    name: str
    make: Callable[[Mapping[str, jax.Array], int], optax.GradientTransformation]
    grads_per_step: int
    grid: Mapping[str, tuple[float, ...]]


class Trained(NamedTuple):
    """What training leaves; leading axes are settings and seeds.

    Attributes:
      params: the weights to evaluate, averages where the optimiser keeps some.
      stats: BatchNorm's running statistics, of these weights on training batches.
      curve: the validation metric at equal distances, the last of them at the end.
    """

    params: Any
    stats: Any
    curve: jax.Array


def draw_rows(examples: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """The training rows of each step: every epoch a new order, what fills no batch is left out."""
    rng = np.random.default_rng([seed, 1])
    size = min(batch_size, examples)
    each = examples // size
    epochs = [rng.permutation(examples)[: each * size] for _ in range(-(-steps // each))]
    return np.concatenate(epochs).reshape(-1, size)[:steps].astype(np.int32)


def train(
    task: Task,
    arm: Arm,
    hypers: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    steps: int,
    *,
    points: int = 1,
    at_once: int | None = None,
) -> Trained:
    """Trains one network a setting and seed; all settings of a seed see the same batches.

    Args:
      task: the network and its data.
      arm: how to train.
      hypers: arrays of one value a setting.
      seeds: of the examples, the initial weights and the batches.
      steps: updates.
      points: of the validation curve; they divide `steps`.
      at_once: settings in memory at a time; None: all.
    """
    if steps % points:
        raise ValueError(f"points={points} must divide steps={steps}")
    parts = [task.draw(seed) for seed in seeds]
    own, valid = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *(getattr(part, name) for part in parts))
        for name in ("train", "valid")
    )
    number = own.targets.shape[1]
    rows = np.stack([draw_rows(number, task.batch_size, steps, seed) for seed in seeds])
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    settings = {name: jnp.asarray(values, jnp.float32) for name, values in hypers.items()}

    @jax.jit
    def run(settings: Any, *seedwise: Any) -> Trained:
        def of_setting(setting: Any) -> Trained:
            tx = optax.with_extra_args_support(arm.make(setting, steps))
            return jax.vmap(lambda *args: _one(task, tx, points, *args))(*seedwise)

        k = len(jax.tree.leaves(settings)[0])
        return jax.lax.map(of_setting, settings, batch_size=at_once or k)

    return run(settings, keys, rows, own, valid)


def _one(
    task: Task, tx: Any, points: int, key: jax.Array, rows: jax.Array, own: Any, valid: Any
) -> Trained:
    """One network."""

    def loss(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, Any]:
        logits, stats = task.apply(params, stats, batch.inputs, True)
        return task.loss(logits, batch.targets), stats

    def batch_of(rows: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], own)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, stats, state = carry
        grad_fn = flatopt.make_grad_fn(loss, stats, batch_of(rows), has_aux=True)
        (value, stats), grads = grad_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value=value, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), stats, state), None

    def evaluated(carry: Any) -> tuple[Any, Any]:
        params = flatopt.eval_params(carry[2], carry[0])
        if not carry[1]:
            return params, carry[1]

        def pass_on(stats: Any, rows: jax.Array) -> tuple[Any, None]:
            return task.apply(params, stats, batch_of(rows).inputs, True)[1], None

        return params, jax.lax.scan(pass_on, carry[1], rows[-STATISTICS_BATCHES:])[0]

    def piece(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        carry = jax.lax.scan(step, carry, rows)[0]
        params, stats = evaluated(carry)
        logits, _ = task.apply(params, stats, valid.inputs, False)
        return carry, task.metric(logits, valid.targets)

    params, stats = task.init(key)
    carry = (params, stats, tx.init(params))
    carry, curve = jax.lax.scan(piece, carry, rows.reshape(points, -1, rows.shape[-1]))
    return Trained(*evaluated(carry), curve)
