"""Random keys in optimiser states: raw key data, which every checkpoint format can hold."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

KeyLike = Any  # An int seed, a typed key, or raw uint32 key data.


def as_key(key: KeyLike) -> jax.Array:
    """`key` as a typed key."""
    # An array too: `optax.inject_hyperparams` makes one of every number.
    if jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    if jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        return key
    if jnp.result_type(key) != jnp.uint32:
        raise ValueError(
            f"key={key!r} must be an int seed, a key from jax.random.key, or its uint32 key data."
        )
    return jax.random.wrap_key_data(key)


def key_data(key: KeyLike) -> jax.Array:
    """Raw uint32 data of `key`, in a buffer of its own."""
    return jnp.array(jax.random.key_data(as_key(key)))


def split(data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New key data to keep, and a typed key to use now."""
    keep, use = jax.random.split(jax.random.wrap_key_data(data))
    return jax.random.key_data(keep), use


def split_like(key: jax.Array, tree: Any) -> Any:
    """A tree of keys with the structure of `tree`, independent of one another."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, list(jax.random.split(key, max(len(leaves), 1)))[: len(leaves)]
    )


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Standard normal draws, one an entry: in float32 or complex64 whatever the precision.

    So a run in float64 sees the noise that the same run in float32 sees.
    """

    def draw(key: jax.Array, shape: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        real = not jnp.issubdtype(dtype, jnp.complexfloating)
        dtype = jnp.float32 if real else jnp.complex64
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)

    return optax.tree.random_like(key, tree, draw)
