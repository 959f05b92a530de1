"""Random keys, kept in states as raw data that every checkpoint format can hold, and draws."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import tree_math

KeyLike = Any  # An int seed, a typed key, or raw uint32 key data.


def as_key(key: KeyLike) -> jax.Array:
    """`key` as a typed key."""
    check_key(key)
    # An array too: `optax.inject_hyperparams` makes one of every number.
    if jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    return key if _is_typed(key) else _wrap_raw(key)


class Stream:
    """Where a stage's random draws come from; its state is raw key data.

    Made in the factory, which must not touch the devices yet: a program may still be about to set
    them up. Raw data does not say to which generator it belongs, so the stream knows.
    """

    def __init__(self, key: KeyLike) -> None:
        """Takes an int seed, a typed key, or raw uint32 key data."""
        check_key(key)
        self._key = key

    def init(self) -> jax.Array:
        """Raw uint32 data of the key, in a buffer of its own."""
        # Computed, as `split` does, so that on a mesh both are laid out, and compiled for, alike.
        return jax.random.key_data(as_key(self._key)) ^ jnp.uint32(0)

    def split(self, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        """New key data to keep, and a typed key to use now."""
        keep, use = jax.random.split(self._wrap(data))
        return jax.random.key_data(keep), use

    def _wrap(self, data: jax.Array) -> jax.Array:
        if _is_typed(self._key):
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(self._key))
        return _wrap_raw(data)


def check_key(key: KeyLike) -> None:
    """Raises unless `key` is an int seed, a typed key, or raw uint32 key data."""
    try:
        dtype = jnp.result_type(key)
    except TypeError:
        dtype = None
    is_seed = dtype is not None and jnp.ndim(key) == 0 and jnp.issubdtype(dtype, jnp.integer)
    if not is_seed and not _is_typed(key) and dtype != jnp.uint32:
        raise ValueError(
            f"key={key!r} must be an int seed, a key from jax.random.key, or its uint32 key data."
        )


def _is_typed(key: KeyLike) -> bool:
    return hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _wrap_raw(data: jax.Array) -> jax.Array:
    """A typed key from raw data: of the default generator if it fits, else of the one it fits."""
    default = str(jax.random.key_impl(jax.random.key(0)))
    lengths = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
    length = jnp.shape(data)[-1]
    fits = lengths.get(default, length) == length
    return jax.random.wrap_key_data(
        data, impl=default if fits else {2: "threefry2x32", 4: "rbg"}.get(length)
    )


def key_data(key: KeyLike) -> jax.Array:
    """Raw uint32 data of `key`, in a buffer of its own."""
    return Stream(key).init()


def split(data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New key data to keep, and a typed key to use now, for raw data without a stream."""
    keep, use = jax.random.split(_wrap_raw(data))
    return jax.random.key_data(keep), use


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Standard normal draws, one an entry: in float32 or complex64 whatever the precision.

    Zeros for what has no place to be moved to: counters, flags, random keys.

    So a run in float64 sees the noise that the same run in float32 sees.
    """

    def real_parts(x: jax.Array) -> jax.Array:
        return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x

    def as_drawn(x: jax.Array, z: jax.Array) -> jax.Array:
        return jax.lax.complex(z[0], z[1]) / jnp.sqrt(2) if jnp.iscomplexobj(x) else z

    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    return jax.tree.map(as_drawn, tree, _draw_like(key, jax.tree.map(real_parts, tree), normal))


def uniform_like(key: jax.Array, tree: Any) -> Any:
    """Draws from [0, 1) in float32, one an entry; zeros for counters, flags, random keys."""
    return _draw_like(key, tree, functools.partial(jax.random.uniform, dtype=jnp.float32))


def signs_like(key: jax.Array, tree: Any) -> Any:
    """Draws of -1 or 1 in float32, one an entry; zeros for counters, flags, random keys."""

    def leaf(x: Any, u: jax.Array) -> jax.Array:
        return jnp.where(u < 0.5, -1.0, 1.0).astype(u.dtype) if tree_math.is_inexact(x) else u

    return jax.tree.map(leaf, tree, uniform_like(key, tree))


def _draw_like(key: jax.Array, tree: Any, sampler: Callable[..., jax.Array]) -> Any:
    """Independent draws, one an entry of `tree`, each lying where its leaf lies."""
    everything, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(x) for x in everything if tree_math.is_inexact(x)]
    groups = tree_math.groups(leaves)
    drawn: dict[int, jax.Array] = {}
    for own_key, group in zip(jax.random.split(key, len(groups)), groups, strict=True):
        chosen = [leaves[i] for i in group]
        if len(group) == 1:
            sharding = jax.typeof(chosen[0]).sharding
            drawn[group[0]] = sampler(own_key, chosen[0].shape, out_sharding=sharding)
            continue
        joined = sampler(own_key, (sum(leaf.size for leaf in chosen),))
        drawn |= zip(group, tree_math.split(joined, chosen), strict=True)
    draws = (drawn[i] for i in range(len(leaves)))
    none = (jnp.zeros(jnp.shape(x)) for x in everything if not tree_math.is_inexact(x))
    return jax.tree.unflatten(
        structure, [next(draws if tree_math.is_inexact(x) else none) for x in everything]
    )
