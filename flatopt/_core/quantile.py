"""Order statistics of large arrays without sorting: a few sweeps, wherever the entries lie.

The bit patterns of floats >= 0, read as integers, are in the order of the floats. So the bits of
the one sought are found one after another, each with one count over all entries.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import tree_math

SORTED_SIZE = 2**12  # Up to here sorting is as fast as counting in a loop.


def quantile(x: jax.Array, q: jax.typing.ArrayLike) -> jax.Array:
    """The `q`-quantile of all entries of `x`, floats >= 0, linear between two neighbours.

    Equals `jnp.quantile`.
    """
    # Sorted, an array that is spread over devices would have to be gathered first.
    if x.size <= SORTED_SIZE and not tree_math.is_on_mesh(x):
        return jnp.quantile(x, q)
    patterns = _patterns(x)
    position = jnp.asarray(q, x.dtype) * (x.size - 1)
    below = jnp.floor(position).astype(jnp.int32)
    found = _last(
        lambda candidate: jnp.sum(patterns < candidate) <= below, patterns.dtype, _num_bits(x)
    )
    lower = jax.lax.bitcast_convert_type(found, x.dtype)
    is_above = patterns > found
    next_above = jnp.min(jnp.where(is_above, x, jnp.inf))
    upper = jnp.where(x.size - jnp.sum(is_above) > below + 1, lower, next_above)
    # `upper` is infinite where there is no entry above, and then `position` is whole.
    share = position - below
    return jnp.where(share > 0, lower + share * (upper - lower), lower)


def largest(x: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    """Bools, True at exactly `number` largest entries of `x`, floats >= 0.

    Of equal entries the first ones are taken; NaN counts as less than all others.
    """
    return _largest_of_all([x], number)[0]


def largest_in_tree(scores: Any, number: jax.typing.ArrayLike) -> Any:
    """Tree of bools, True at exactly the `number` largest of all entries; see `largest`."""
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        return scores
    if any(map(tree_math.is_on_mesh, leaves)):
        # Joined, leaves that are spread over devices would have to be gathered first.
        return jax.tree.unflatten(structure, _largest_of_all(leaves, number))
    joined = jnp.concatenate([x.ravel() for x in leaves])
    return jax.tree.unflatten(structure, tree_math.split(largest(joined, number), leaves))


def _largest_of_all(parts: list[jax.Array], number: jax.typing.ArrayLike) -> list[jax.Array]:
    """`largest` of all entries of the parts together, one part after another."""
    dtype = jnp.result_type(*parts)
    # Once for all that looks at it: computed anew, as XLA may do, an entry has another last bit.
    parts = jax.lax.optimization_barrier([x.astype(dtype) for x in parts])
    patterns = [jnp.where(jnp.isnan(x), 0, _patterns(x) + 1) for x in parts]
    least = _last(
        lambda candidate: _count(p >= candidate for p in patterns) >= number,
        patterns[0].dtype,
        _num_bits(parts[0]),
    )
    above, equal = [p > least for p in patterns], [p == least for p in patterns]
    left, places = number - _count(above), _places(parts)

    def among_first(end: jax.Array) -> list[jax.Array]:
        return [e & (place < end) for e, place in zip(equal, places, strict=True)]

    bits = sum(x.size for x in parts).bit_length()
    end = _last(lambda candidate: _count(among_first(candidate)) <= left, jnp.uint32, bits)
    return [a | f for a, f in zip(above, among_first(end), strict=True)]


def _count(masks: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.sum(m) for m in masks), jnp.int32(0))


def _places(parts: list[jax.Array]) -> list[jax.Array]:
    """The number of each entry in the row of all, lying where the entries lie."""
    found, before = [], 0
    for x in parts:
        place, stride = jnp.full_like(x, before, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            stride *= x.shape[axis]
        found.append(place)
        before += x.size
    return found


def _patterns(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{x.dtype.itemsize * 8}"))


def _num_bits(x: jax.Array) -> int:
    """Of the patterns of `x`: the sign bit of floats >= 0 is 0."""
    return x.dtype.itemsize * 8 - 1


def _last(holds: Callable[[jax.Array], jax.Array], dtype: Any, bits: int) -> jax.Array:
    """The greatest number of `bits` bits for which `holds`; it must hold for all below, too."""

    def decide(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.ones([], dtype) << jnp.asarray(bits - 1 - i, dtype))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, decide, jnp.zeros([], dtype))
