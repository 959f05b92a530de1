"""Focusing belief propagation for a perceptron of binary weights (Baldassi and others, 1605.06444).

Messages of ordinary belief propagation estimate how many solutions have each weight up. An extra
message on every weight, which grows, lets several replicas of it attract one another: so they
settle where solutions are dense.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

STEPS = 50  # Values of rho, evenly from 0 to 1.
ITERATIONS = 20  # Of the messages at each.
DAMPING = 0.5  # The share of the old messages that stays.


def pattern_messages(patterns: jax.Array, magnetisations: jax.Array) -> jax.Array:
    """What each pattern tells each weight, [patterns, inputs], by the central limit theorem.

    `patterns` are inputs times labels, +-1; `magnetisations` those of the weights without the
    message of the pattern that hears them, in the same shape.
    """
    parts = patterns * magnetisations
    spread = 1 - magnetisations**2
    others = jnp.sum(parts, axis=1, keepdims=True) - parts
    width = jnp.sqrt(jnp.maximum(jnp.sum(spread, axis=1, keepdims=True) - spread, 1e-3))
    up, down = log_ndtr((others + patterns) / width), log_ndtr((others - patterns) / width)
    return (up - down) / 2


def focusing_message(field: jax.Array, polarisation: jax.Array, y: jax.Array) -> jax.Array:
    """What `y` - 1 replicas, bound with `polarisation` = tanh gamma, tell a weight's field."""
    bound = jnp.arctanh(polarisation * jnp.tanh(field))
    return jnp.arctanh(polarisation * jnp.tanh((y - 1) * bound))


def focus(patterns: jax.Array, key: jax.Array) -> jax.Array:
    """Binary weights that satisfy all patterns, at the first iteration that has them, or the last.

    The protocol is the authors' pseudo-reinforcement: rho from 0 to 1, tanh gamma = sqrt(rho) and
    y = (2 - rho) / (1 - rho).
    """
    start = 0.1 * jax.random.normal(key, patterns.shape)

    def iterate(carry: Any, rho: jax.Array) -> tuple[Any, None]:
        messages, own, weights = carry
        cavity = jnp.sum(messages, axis=0)
        told = focusing_message(cavity, jnp.sqrt(rho), (2 - rho) / (1 - rho))
        own = DAMPING * own + (1 - DAMPING) * told
        field = jnp.clip(cavity + own, -8.0, 8.0)
        told = pattern_messages(patterns, jnp.tanh(field[None] - messages))
        messages = DAMPING * messages + (1 - DAMPING) * jnp.clip(told, -8.0, 8.0)
        solved = jnp.all(patterns @ weights > 0)
        return (messages, own, jnp.where(solved, weights, jnp.where(field > 0, 1.0, -1.0))), None

    rhos = jnp.repeat(jnp.arange(STEPS) / STEPS, ITERATIONS)
    first = start, jnp.zeros_like(start[0]), jnp.where(start[0] > 0, 1.0, -1.0)
    (_, _, weights), _ = jax.lax.scan(iterate, first, rhos)
    return weights
