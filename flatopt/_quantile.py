"""Quantiles of large arrays without sorting: a few sweeps, wherever the entries lie."""

import jax
import jax.numpy as jnp

from flatopt import _tree

SORTED_SIZE = 2**12  # Up to here sorting is as fast as counting in a loop.


def quantile(x: jax.Array, q: jax.typing.ArrayLike) -> jax.Array:
    """The `q`-quantile of all entries of `x`, floats >= 0, linear between two neighbours.

    Equals `jnp.quantile`, but counts instead of sorting: the bit patterns of floats >= 0, read as
    integers, are in the order of the floats, so that the bits of the one sought are found one after
    another, each with one count over all entries.
    """
    if x.size <= SORTED_SIZE:
        return jnp.quantile(_tree.replicate(x), q)
    width = x.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    patterns = jax.lax.bitcast_convert_type(x, unsigned)
    position = jnp.asarray(q, x.dtype) * (x.size - 1)
    below = jnp.floor(position).astype(jnp.int32)

    def decide(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.ones([], unsigned) << (width - 1 - i).astype(unsigned))
        return jnp.where(jnp.sum(patterns < candidate) <= below, candidate, found)

    found = jax.lax.fori_loop(0, width, decide, jnp.zeros([], unsigned))
    lower = jax.lax.bitcast_convert_type(found, x.dtype)
    is_above = patterns > found
    next_above = jnp.min(jnp.where(is_above, x, jnp.inf))
    upper = jnp.where(x.size - jnp.sum(is_above) > below + 1, lower, next_above)
    # `upper` is infinite where there is no entry above, and then `position` is whole.
    share = position - below
    return jnp.where(share > 0, lower + share * (upper - lower), lower)
