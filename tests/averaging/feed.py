"""Averaging stages fed with given weights, and runs on a noisy quadratic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import Golden

WEIGHTS = np.random.default_rng(0).normal(size=7)


def feed(stage: Any, weights: Any = WEIGHTS, dtype: Any = jnp.float32) -> Any:
    """The state of an averaging stage that has seen these weights, one after another."""
    state = stage.init(jnp.zeros([], dtype))
    update = jax.jit(lambda s, w: stage.update(jnp.zeros([], dtype), s, w)[1])
    for w in weights:
        state = update(state, jnp.asarray(w, dtype))
    return state


def evaluated(stage: Any, weights: Any = WEIGHTS) -> float:
    return float(flatopt.eval_params(feed(stage, weights), jnp.asarray(weights[-1], "f")))


def noisy_run(tx: Any, steps: int, curvature: float, samples: int = 20_000) -> Any:
    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = curvature * (params - jax.random.normal(key, params.shape))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(samples)
    keys = jax.random.split(jax.random.key(3), steps)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((start, tx.init(start)))
    return params, state


def sgd_variance(rate: float, curvature: float) -> float:
    contraction = 1 - rate * curvature
    return (rate * curvature) ** 2 / (1 - contraction**2)


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def first_recorded(golden: Golden, field: str) -> int:
    """The first of the recorded step numbers, or one past the end."""
    return int(next(iter(golden.arrays[field]), golden.steps + 1))
