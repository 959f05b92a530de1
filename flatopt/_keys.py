"""Random state as raw key data, which every checkpoint format can store."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Key = int | jax.Array | None


def key_data(key: Key) -> jax.Array:
    """The raw uint32 data of a typed key, of raw key data, or of an integer seed; None is 0."""
    if key is None or isinstance(key, int | np.integer):
        key = jax.random.key(0 if key is None else int(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key)
    return jnp.array(key, jnp.uint32)  # A copy: states never alias what they are made from.


def split(data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key data for later, and a key to use now."""
    later, now = jax.random.split(jax.random.wrap_key_data(data))
    return jax.random.key_data(later), now


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Standard normal draws, one an entry: in float32 or complex64 whatever the precision.

    So a run in float64 sees the noise that the same run in float32 sees.
    """

    def draw(key: jax.Array, shape: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        real = not jnp.issubdtype(dtype, jnp.complexfloating)
        dtype = jnp.float32 if real else jnp.complex64
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)

    return optax.tree.random_like(key, tree, draw)
