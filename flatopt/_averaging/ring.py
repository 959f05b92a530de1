"""A ring buffer of parameter trees: the latest few, stacked along a new leading axis."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import means


def empty(params: optax.Params, size: int, dtype: Any = None) -> optax.Params:
    """Zeros: `size` trees like `params`, each leaf stacked along a new first axis.

    In `dtype`, or in those of `params`. The other axes lie over the devices as `params` do.
    """

    def leaf(param: Any) -> jax.Array:
        own = jnp.result_type(param)
        narrowed = dtype is not None and jnp.issubdtype(own, jnp.inexact)
        kept = means.with_complex(dtype, own) if narrowed else None
        return jnp.stack([jnp.zeros_like(param, kept)] * size)

    return jax.tree.map(leaf, params)


def size(ring: Any) -> int:
    """How many trees fit; 0 for a tree without leaves."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(ring)), 0)


def push(ring: Any, tree: Any, number: jax.Array) -> Any:
    """Puts `tree` in, over the oldest one if the ring is full; `number` were put in before."""

    def leaf(stack: jax.Array, x: jax.Array) -> jax.Array:
        x = x if x.dtype == stack.dtype else x.astype(stack.dtype)
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


def require_size(name: str, argument: str, wanted: int, ring: Any) -> None:
    """Raises where a state was made, and then restored, for another size."""
    found = size(ring)
    if jax.tree.leaves(ring) and found != wanted:
        raise ValueError(
            f"flatopt.{name}({argument}={wanted}) was given a state that was made with "
            f"{argument}={found}. Use {argument}={found} to go on, or start anew with `init`."
        )


def collect(name: str, argument: str, wanted: int, state: Any, params: optax.Params) -> Any:
    """`state`, which has the fields `ring` and `number`, with one more model in its ring.

    The factory `name` was told to keep `argument=wanted` of them.
    """
    require_size(name, argument, wanted, state.ring)
    return state._replace(
        number=optax.safe_increment(state.number), ring=push(state.ring, params, state.number)
    )
