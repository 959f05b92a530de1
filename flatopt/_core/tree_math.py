"""Tree arithmetic that `optax.tree` lacks: norms and products that survive half precision."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Small leaves are joined before they are summed over, and their noise is drawn at once: the compile
# time of XLA grows with the square of the number of sums, and also, more slowly, with the number of
# leaves that are joined at once.
JOINED_SIZE = 2**14
JOINED_NUMBER = 32
# Sums of squares in float32 lose nothing between these; entries times one of the scales, by which
# larger and smaller ones are multiplied, have squares there. The powers of two keep every bit. XLA
# multiplies zeros that it knows, as of a mask, by the square of the scale: that must be finite.
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-96, 2.0**127
SCALES = 2.0**-90, 2.0**63

EPSILON = 1e-12  # Guards every division by a norm; the value of the SAM reference implementations.


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype to accumulate in: float32 at least, integers as they are."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def scalar_dtype(tree: Any) -> Any:
    """The real dtype of norms and scalar products of `tree`: float32 at least."""
    dtypes = (jnp.finfo(x.dtype).dtype for x in _inexact_leaves(tree))
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def vdot(tree: Any, other: Any) -> jax.Array:
    """Real part of the inner product, summed in `scalar_dtype`.

    Unlike `optax.tree.vdot` it does not overflow in float16, and products are taken elementwise:
    a dot product would be rounded to bfloat16 or TF32 on accelerators by default. Integers, keys
    and other leaves that no gradient moves do not count.
    """
    x = _inexact_leaves(tree)
    if other is tree:
        return _sum_of_products(x, x)
    pairs = jax.tree.leaves(jax.tree.map(_Pair, tree, other), is_leaf=_is_pair)
    seconds = [jnp.asarray(pair.second) for pair in pairs if is_inexact(pair.first)]
    return _sum_of_products(x, seconds)


def norm(tree: Any) -> jax.Array:
    """The global Euclidean norm over all leaves, in `scalar_dtype`.

    It neither overflows nor underflows where the entries themselves do not: where the plain sum of
    squares leaves the middle of the range, it is taken once more of entries scaled by a power of
    two. Elsewhere that costs nothing, and no bit changes.
    """
    leaves = _inexact_leaves(tree)
    square = _sum_of_products(leaves, leaves)
    if square.dtype != jnp.float32:
        return jnp.sqrt(square)

    def scaled() -> jax.Array:
        down, up = (jnp.float32(scale) for scale in SCALES)
        factor = jnp.where(square > 1, down, up)
        moved = [x.astype(accumulator_dtype(x.dtype)) * factor for x in leaves]
        return jnp.sqrt(_sum_of_products(moved, moved)) / factor

    is_plain = (square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE)
    if any(jax.typeof(x).sharding.mesh.are_all_axes_explicit for x in leaves):
        # Under `jax.vmap` a branch becomes a choice of all leaves, which JAX cannot lay out here.
        return apply_if(~is_plain, lambda _: scaled(), jnp.sqrt(square))
    return jax.lax.cond(is_plain, lambda: jnp.sqrt(square), scaled)


def cosine(tree: Any, other: Any) -> jax.Array:
    r""":math:`x \cdot y / (\|x\| \|y\|)`; 0 where one of them is zero."""
    # Apart, so that the product of two small norms does not vanish in half precision.
    lengths = [norm(x) + EPSILON for x in (tree, other)]
    return vdot(tree, other) / lengths[0] / lengths[1]


def _sum_of_products(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    dtype = scalar_dtype(x)
    total = jnp.zeros([], dtype)
    # Joined, leaves that are spread over devices would have to be gathered first.
    alone = [i for i, pair in enumerate(zip(x, y, strict=True)) if any(map(is_on_mesh, pair))]
    for group in groups(x, alone=alone):
        left = _join(x, group)
        right = left if y is x else _join(y, group)
        total += jnp.sum((left.conj() * right).real, dtype=dtype)
    return total


class _Pair(NamedTuple):
    first: Any
    second: Any


def _is_pair(node: Any) -> bool:
    return isinstance(node, _Pair)


def size(tree: Any) -> int:
    """Number of entries that a gradient moves."""
    return sum(x.size for x in _inexact_leaves(tree))


def square(x: jax.Array) -> jax.Array:
    """Squared absolute values, in float32 at least."""
    wide = jnp.asarray(x, accumulator_dtype(jnp.result_type(x)))
    return (wide.conj() * wide).real


def ratio_or_zero(numerator: Any, denominator: jax.Array) -> jax.Array:
    """`numerator / denominator`, or zero where the denominator (never negative) is zero."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def on_inexact(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` leaf by leaf, in the dtypes of `tree`.

    Counters, flags and random keys stay, and what `optax.masked` has cut out of the others.
    """

    def leaf(x: Any, *rest: Any) -> Any:
        if any(map(is_masked, rest)) or not all(map(is_inexact, (x, *rest))):
            return x
        # Python's and numpy's numbers have no dtype, or one that JAX does not use.
        return jnp.asarray(function(x, *rest), jnp.result_type(x))

    return jax.tree.map(leaf, tree, *others)


def widened(tree: Any, like: Any) -> Any:
    """`tree`, each leaf in a dtype that also holds the numbers of its leaf of `like`.

    So that an update can lead from one of them to another, whatever precision the gradients have.
    """

    def leaf(x: Any, other: Any) -> Any:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.result_type(other)))

    return jax.tree.map(lambda x, y: leaf(x, y) if is_inexact(x) else x, tree, like)


def scale(scalar: Any, tree: Any) -> Any:
    """`scalar * tree`, each leaf in its own dtype."""
    return on_inexact(lambda x: scalar * x, tree)


def add_scaled(tree: Any, scalar: Any, other: Any) -> Any:
    """`tree + scalar * other`, in the dtypes of `tree`."""
    return on_inexact(lambda x, y: x + scalar * y, tree, other)


def orthogonal(tree: Any, to: Any) -> Any:
    """The part of `tree` that is orthogonal to the tree `to`; all of it where `to` is zero."""
    inverse_norm = ratio_or_zero(1, norm(to))
    # The unit vector first: the square of a small norm would fall below the guard.
    coefficient = vdot(scale(inverse_norm, to), tree) * inverse_norm
    return add_scaled(tree, -coefficient, to)


def replicate(x: jax.Array) -> jax.Array:
    """`x` on every device where the mesh has explicit axes: to be sorted, or joined with others."""
    if jax.typeof(x).sharding.mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, jax.sharding.PartitionSpec())
    return x


def is_on_mesh(x: jax.Array) -> bool:
    """Whether `x` lies on a mesh whose axes the compiler or the type assigns, not the program."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and not mesh.are_all_axes_manual


def apply_if(predicate: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
    """`function(carry)` in the dtypes of `carry` where `predicate` holds; else `carry`.

    A loop of one turn or none: XLA lets `carry` stay where it is, while `jax.lax.cond` copies what
    its branches hand through. The price: under `jax.jit` it has no reverse-mode derivative.
    """

    def turn(_: Any, carry: Any) -> Any:
        # A state takes the dtype of the gradients at its first update, whoever makes it.
        return jax.tree.map(as_dtype_of, function(carry), carry)

    carry = jax.tree.map(jnp.asarray, carry)
    return jax.lax.fori_loop(0, predicate.astype(jnp.int32), turn, carry)


def as_dtype_of(x: Any, like: Any) -> jax.Array:
    """`x` in the dtype of `like`."""
    # Of Python's and numpy's numbers too: JAX may not use the dtype that they bring.
    own = jnp.result_type(like)
    return jnp.asarray(x) if jnp.result_type(x) == own else jnp.asarray(x, own)


def cast_like(tree: Any, like: Any) -> Any:
    """`tree`, each leaf in the dtype of its leaf of `like`."""
    return jax.tree.map(as_dtype_of, tree, like)


def as_stored(tree: Any) -> Any:
    """`tree`, rounded as memory holds it.

    Within a program XLA computes half precision in single and rounds what it stores alone: what is
    to be taken back later from a state has to be added as it stands there.
    """

    def leaf(x: jax.Array) -> jax.Array:
        info = jnp.finfo(x.dtype)
        return x if info.bits >= 32 else jax.lax.reduce_precision(x, info.nexp, info.nmant)

    return jax.tree.map(lambda x: leaf(x) if is_inexact(x) else x, tree)


def groups(leaves: list[jax.Array], alone: Collection[int] = ()) -> list[list[int]]:
    """Numbers of the leaves to be taken together: small ones, except those that stay `alone`."""
    small = [i for i, x in enumerate(leaves) if x.size <= JOINED_SIZE and i not in alone]
    together = [small[i : i + JOINED_NUMBER] for i in range(0, len(small), JOINED_NUMBER)]
    return together + [[i] for i in sorted(set(range(len(leaves))) - set(small))]


def split(joined: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    """Cuts one dimension into arrays of the shapes of `leaves`, each lying where its leaf lies."""
    ends = list(itertools.accumulate(x.size for x in leaves))
    parts = jnp.split(joined, ends[:-1])
    # A sum lies where its terms do, and the zeros lie where the leaf does.
    return [
        jnp.zeros_like(x, joined.dtype) + part.reshape(x.shape)
        for x, part in zip(leaves, parts, strict=True)
    ]


def merge_masked(trees: Iterable[Any], like: Any) -> Any:
    """One tree of the structure of `like`: each leaf from the tree that has it.

    Trees made under `optax.masked` or `optax.partition` hold `optax.MaskedNode` in place of leaves
    or whole subtrees. A leaf of `like` that no tree has comes back as `optax.MaskedNode`.
    """

    def spread_mask(node: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda _: node, subtree) if is_masked(node) else node

    def pick(_: Any, *candidates: Any) -> Any:
        return next((c for c in candidates if not is_masked(c)), optax.MaskedNode())

    spread = [jax.tree.map(spread_mask, tree, like, is_leaf=is_masked) for tree in trees]
    return jax.tree.map(pick, like, *spread)


def leaves_and_masks(tree: Any) -> list[Any]:
    """The leaves, and the marks of those that `optax.masked` cut out."""
    return jax.tree.leaves(tree, is_leaf=is_masked)


def is_masked(leaf: Any) -> bool:
    """Whether `leaf` stands for one that `optax.masked` cut out."""
    return isinstance(leaf, optax.MaskedNode)


def is_inexact(x: Any) -> bool:
    """Whether a gradient moves `x`, and it has a mean: no counter, flag, or random key."""
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _inexact_leaves(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_inexact(x)]


def _join(leaves: list[jax.Array], group: list[int]) -> jax.Array:
    """The chosen leaves as one array, to be summed over."""
    chosen = [leaves[i].astype(accumulator_dtype(leaves[i].dtype)) for i in group]
    return chosen[0] if len(chosen) == 1 else jnp.concatenate([x.ravel() for x in chosen])


def move(params: optax.Params, scale: jax.typing.ArrayLike, direction: Any) -> optax.Params:
    """`params + scale * direction`, in the dtypes of `params`; masked leaves stay."""
    return on_inexact(lambda param, towards: param + scale * towards, params, direction)
