"""Random keys, kept in states as raw data that every checkpoint format can hold, and draws.

An entry's draw is a function of the key, of its leaf's number and of its place in the leaf: pure
arithmetic, that XLA makes one pass with what the draw is added to, on every layout of the devices.
Keys of other generators than Threefry draw with theirs, into memory.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import tree_math

KeyLike = Any  # An int seed, a typed key, or raw uint32 key data.
Words = tuple[jax.Array, jax.Array]  # Two uint32 arrays.

# Threefry-2x32 (Salmon, Moraes, Dror, Shaw, SC 2011) in its form of 13 rounds. Unrolled:
# `jax.random.bits` loops over its 20 rounds on a CPU, with a pass over memory for each four.
ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
# Leaves of at most so many entries are drawn for at once, in rows: compile_time_leaves,
# local_entropy L=5.
JOINED_SIZE, ROW_SIZE = 2**16, 2**18
# Least squares on Chebyshev points: log(1 + t) / t between sqrt(1/2) - 1 and sqrt(2) - 1, to 2e-7
# in the logarithm, and sin(pi s / 2) / s in powers of s^2 for |s| <= 1, to 6e-7 in the sine. Those
# of XLA are a call an entry on a CPU.
LOG = (1.00000414, -0.500014467, 0.332989553, -0.248981204, 0.206738354, -0.187792083, 0.114490826)
SINE = (1.57079099, -0.645892663, 0.0794339708, -0.00433288165)


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


def threefry2x32(key: jax.Array, counter: Words, rounds: int = ROUNDS) -> Words:
    """Threefry-2x32 of raw key data and a counter: two random words for each entry."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        turn = ROTATIONS[i % 8]
        x = x + y
        y = ((y << turn) | (y >> (32 - turn))) ^ x
        if i % 4 == 3:
            block = i // 4 + 1
            x, y = x + keys[block % 3], y + keys[(block + 1) % 3] + jnp.uint32(block)
    return x, y


def normal_from(words: Words) -> jax.Array:
    r"""Standard normal numbers in float32 by Box and Muller's transform, one for two words.

    .. math:: z = \sqrt{-2 \log u} \, \sin(\pi s / 2), \quad u \in (0, 1], \; s \in [-1, 1]

    The angle is of half a circle, since the sine of the other half has the same law. The largest
    draw is 6.8.
    """
    radius, angle = words
    # u = m 2^(e - 32), with m between sqrt(1/2) and sqrt(2).
    number = radius.astype(jnp.float32) + 0.5
    raw = jax.lax.bitcast_convert_type(number, jnp.int32)
    e = (raw - np.float32(0.5**0.5).view(np.int32)) >> 23
    t = jax.lax.bitcast_convert_type(raw - (e << 23), jnp.float32) - 1
    exponents = (32 - e).astype(jnp.float32) * np.float32(2 * math.log(2))
    square = jnp.maximum(exponents - 2 * t * _polynomial(LOG, t), 0)
    s = jax.lax.bitcast_convert_type(angle, jnp.int32).astype(jnp.float32) * np.float32(2**-31)
    return jnp.sqrt(square) * (s * _polynomial(SINE, s * s))


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + np.float32(c)
    return value


def uniform_from(words: Words) -> jax.Array:
    """Numbers of [0, 1) in float32, multiples of 2^-24."""
    return (words[0] >> 8).astype(jnp.float32) * np.float32(2**-24)


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Standard normal draws, one an entry: in float32 or complex64 whatever the precision.

    Zeros for what has no place to be moved to: counters, flags, random keys.

    So a run in float64 sees the noise that the same run in float32 sees. What adds a draw to half
    precision is one pass with it: in float32 it stands in registers only.
    """

    def real_parts(x: jax.Array) -> jax.Array:
        return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x

    def as_drawn(x: jax.Array, z: jax.Array) -> jax.Array:
        return jax.lax.complex(z[0], z[1]) / jnp.sqrt(2) if jnp.iscomplexobj(x) else z

    drawn = _draw_like(key, jax.tree.map(real_parts, tree), normal_from)
    return jax.tree.map(as_drawn, tree, drawn)


def uniform_like(key: jax.Array, tree: Any) -> Any:
    """Draws from [0, 1) in float32, one an entry; zeros for counters, flags, random keys."""
    return _draw_like(key, tree, uniform_from)


def signs_like(key: jax.Array, tree: Any) -> Any:
    """Draws of -1 or 1 in float32, one an entry; zeros for counters, flags, random keys."""

    def leaf(x: Any, u: jax.Array) -> jax.Array:
        return jnp.where(u < 0.5, -1.0, 1.0).astype(u.dtype) if tree_math.is_inexact(x) else u

    return jax.tree.map(leaf, tree, uniform_like(key, tree))


def _draw_like(key: jax.Array, tree: Any, transform: Callable[[Words], jax.Array]) -> Any:
    """Independent draws, one an entry of `tree`, each lying where its leaf lies."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(x) if tree_math.is_inexact(x) else x for x in leaves]
    small = [x for x in leaves if tree_math.is_inexact(x) and x.size <= JOINED_SIZE]
    joined: Iterator[jax.Array] = iter(())
    if small:
        row = functools.partial(_words, key, 0)
        drawn = _in_rows(row, transform, sum(x.size for x in small))
        joined = iter(_cut(drawn, small, jax.random.key_data(key)))
    numbers = itertools.count(1)

    def leaf(x: Any) -> jax.Array:
        if not tree_math.is_inexact(x):
            return jnp.zeros(jnp.shape(x))
        if x.size <= JOINED_SIZE:
            return next(joined)
        kind = jax.typeof(x)
        return transform(_words(key, next(numbers), kind.shape, sharding=kind.sharding))

    return jax.tree.unflatten(structure, [_lie_like(leaf(x), x) for x in leaves])


def _lie_like(draw: jax.Array, x: Any) -> jax.Array:
    """Outside `jax.jit` no compiler lays the draw where it is used."""
    if isinstance(draw, jax.core.Tracer) or isinstance(x, jax.core.Tracer):
        return draw
    if not isinstance(x, jax.Array):
        return draw
    return jax.device_put(draw, x.sharding) if len(x.sharding.device_set) > 1 else draw


def _in_rows(words: Callable[..., Words], transform: Callable[..., Any], size: int) -> jax.Array:
    """So many draws, in memory: a loop of two turns at least holds the generator but once.

    Fused with its use, it would be compiled as often as there are leaves.
    """
    turns = max(2, -(-size // ROW_SIZE))
    width = -(-size // turns)
    rows = jax.lax.map(
        lambda i: transform(words((width,), row=i)), jnp.arange(turns, dtype=jnp.uint32)
    )
    return rows.ravel()[:size]


def _cut(drawn: jax.Array, leaves: list[jax.Array], data: jax.Array) -> list[jax.Array]:
    """One dimension cut into arrays of the shapes of `leaves`, each lying where its leaf lies."""
    ends = list(itertools.accumulate(x.size for x in leaves))
    begins = [np.uint32(end - x.size) for end, x in zip(ends, leaves, strict=True)]
    # Places that XLA does not know: it compiles one kernel for all leaves of a shape, else one for
    # each. (The condition always holds.)
    begins = jax.lax.cond(
        jax.lax.bitcast_convert_type(data[0] >> 1, jnp.int32) >= 0,
        lambda: begins,
        lambda: [np.uint32(0)] * len(begins),
    )

    @jax.jit  # Traced once for all leaves of a shape.
    def part(begin: jax.Array, x: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice(drawn, (begin,), (x.size,)).reshape(x.shape)
        # A sum lies where its terms do, and the zeros lie where the leaf does.
        return jnp.zeros_like(x, own.dtype) + own

    return [part(begin, x) for begin, x in zip(begins, leaves, strict=True)]


def _words(
    key: jax.Array, number: int, shape: tuple[int, ...], row: Any = None, sharding: Any = None
) -> Words:
    """Two random words for each entry of array `number`, or of one of its rows."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        data, (low, high) = _counter(jax.random.key_data(key), shape, sharding)
        if row is not None:
            low = low + row * jnp.uint32(shape[0])
        return threefry2x32(data, (low, (high << 16) + jnp.uint32(number)))
    key = jax.random.fold_in(key, number)
    keys = jax.random.split(key if row is None else jax.random.fold_in(key, row))
    bits = functools.partial(jax.random.bits, shape=shape, out_sharding=sharding)
    return bits(keys[0]), bits(keys[1])


def _counter(data: jax.Array, shape: tuple[int, ...], sharding: Any) -> tuple[jax.Array, Words]:
    """The key data, and the place of each entry, in row-major order, as low and high words."""
    words = [jnp.zeros([], jnp.uint32)] * 2
    strides = _strides(shape)
    # Tied to the key, since else XLA moves the places out of a loop, and each turn reads them.
    data, *factors = jax.lax.optimization_barrier((data, *(jnp.uint32(s) for _, s in strides)))
    for axis, ((word, _), factor) in enumerate(zip(strides, factors, strict=True)):
        places = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        words[word] = words[word] + places * factor
    return data, (words[0], words[1])


def _strides(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each axis the word that counts it, 0 or 1, and how far apart its entries are there."""
    strides: list[tuple[int, int]] = []
    word, stride = 0, 1
    for length in reversed(shape):
        if word == 0 and stride * length > 2**32:
            word, stride = 1, 1
        strides.insert(0, (word, stride))
        stride *= length
    return strides
