"""A ring buffer of parameter trees: the latest few, stacked along a new leading axis."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def empty(params: optax.Params, size: int) -> optax.Params:
    """Zeros: `size` trees like `params`, each leaf stacked along a new first axis.

    The other axes lie over the devices as those of `params` do.
    """
    return jax.tree.map(lambda p: jnp.stack([jnp.zeros_like(p)] * size), params)


def size(ring: Any) -> int:
    """How many trees fit; 0 for a tree without leaves."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(ring)), 0)


def push(ring: Any, tree: Any, number: jax.Array) -> Any:
    """Puts `tree` in, over the oldest one if the ring is full; `number` were put in before."""

    def leaf(stack: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, x, number % stack.shape[0], axis=0)

    return jax.tree.map(leaf, ring, tree)


def ordered(ring: Any, number: jax.Array) -> Any:
    """The stack with the oldest tree first; slots that are still empty come last."""

    def leaf(stack: jax.Array) -> jax.Array:
        length = stack.shape[0]
        return jnp.roll(stack, -jnp.where(number > length, number % length, 0), axis=0)

    return jax.tree.map(leaf, ring)


def weights(number: jax.Array, length: int) -> jax.Array:
    """Equal weights of the slots in use, zero for the others."""
    filled = jnp.minimum(number, length)
    # 1.0: an int32 divided by another would be a float32 also where floats are float64.
    return (jnp.arange(length) < filled) * (1.0 / jnp.maximum(filled, 1))


def collect(state: Any, params: optax.Params) -> Any:
    """`state`, which has the fields `ring` and `number`, with one more model in its ring."""
    return state._replace(
        number=optax.safe_increment(state.number), ring=push(state.ring, params, state.number)
    )
