"""Orthonormal bases whose vectors are trees of leaves: nothing is flattened, shardings survive."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import checks, tree_math
from flatopt.measures._variables import Vector

TINY = 1e-30  # Guards quotients of quantities that may be exactly zero.


class Extension(NamedTuple):
    """What remains of a vector outside a basis.

    Attributes:
      unit: a unit vector orthogonal to the basis.
      length: length of the remainder; 0 when nothing but rounding was left, in which case `unit`
        is a random direction.
      coefficients: of the vector in the basis.
    """

    unit: Vector
    length: jax.Array
    coefficients: jax.Array


def zeros(template: Vector, rows: int) -> Vector:
    """`rows` zero vectors like `template`."""
    return tuple(jnp.broadcast_to(jnp.zeros_like(x)[None], (rows, *x.shape)) for x in template)


def row(basis: Vector, i: Any) -> Vector:
    """Vector number `i`."""
    return tuple(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in basis)


def set_row(basis: Vector, i: Any, vector: Vector) -> Vector:
    """The basis with vector number `i` replaced."""
    pairs = zip(basis, vector, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(b, x, i, 0) for b, x in pairs)


def random_unit(key: jax.Array, template: Vector) -> Vector:
    """A unit vector of uniformly random direction."""
    vector = random_normal(key, template)
    return tree_math.scale(1 / (tree_math.norm(vector) + TINY), vector)


def random_normal(key: jax.Array, template: Vector) -> Vector:
    """A vector of standard normal entries."""
    keys = jax.random.split(key, len(template))
    pairs = zip(keys, template, strict=True)
    return tuple(like(x, jax.random.normal(k, x.shape, x.dtype)) for k, x in pairs)


def like(template: jax.Array, value: jax.Array) -> jax.Array:
    """`value` with the sharding of `template`: adding zeros is the way that every version has."""
    return value + jnp.zeros_like(template)


def products(basis: Vector, vector: Vector) -> jax.Array:
    """Scalar products of every basis vector with `vector`."""
    # Elementwise, as in `tree_math.vdot`: a dot product may be rounded to bfloat16 or TF32.
    terms = [
        jnp.sum(b * x[None], axis=tuple(range(1, b.ndim)), dtype=tree_math.scalar_dtype(basis))
        for b, x in zip(basis, vector, strict=True)
    ]
    return jnp.sum(jnp.stack(terms), axis=0)


def gram(rows: Vector, columns: Vector) -> jax.Array:
    """Matrix of scalar products of the vectors of two bases."""
    return jax.lax.map(lambda vector: products(columns, vector), rows)


def combine(coefficients: jax.Array, basis: Vector) -> Vector:
    """The sum of the basis vectors with these coefficients."""
    # A dot product: on CPU XLA's sum over the leading axis is a thousand times slower.
    return tuple(
        jax.lax.dot_general(
            coefficients.astype(b.dtype), b, (((0,), (0,)), ((), ())), jax.lax.Precision.HIGHEST
        )
        for b in basis
    )


def extend(basis: Vector, vector: Vector, key: jax.Array) -> Extension:
    """Removes from `vector` what lies in the basis, and scales the rest to length 1.

    The basis may hold zero vectors. Projecting twice makes the result orthogonal to rounding.
    When the vector lies in the basis, a random vector takes its place: a Lanczos run goes on beyond
    an invariant subspace, and finds the other eigenvectors of a multiple eigenvalue.
    """

    def project(vector: Vector) -> tuple[Vector, jax.Array]:
        coefficients = products(basis, vector)
        inside = combine(coefficients, basis)
        return tuple(x - y for x, y in zip(vector, inside, strict=True)), coefficients

    before = tree_math.norm(vector)
    once, first = project(vector)
    twice, second = project(once)
    length = tree_math.norm(twice)
    noise = 32 * jnp.finfo(length.dtype).eps * before
    lost = (length <= noise) | (length <= TINY)

    def replace() -> Vector:
        fresh = random_unit(key, vector)
        for _ in range(3):
            fresh = project(fresh)[0]
            fresh = tree_math.scale(1 / (tree_math.norm(fresh) + TINY), fresh)
        return fresh

    unit = jax.lax.cond(lost, replace, lambda: tree_math.scale(1 / (length + TINY), twice))
    return Extension(unit, jnp.where(lost, 0.0, length), first + second)


def orthonormalise(vectors: Vector, key: jax.Array) -> tuple[Vector, jax.Array]:
    """QR decomposition of the vectors as columns: an orthonormal basis, and the triangle R."""
    number = vectors[0].shape[0]
    dtype = tree_math.scalar_dtype(vectors)

    def one(i: Any, carry: tuple[Vector, jax.Array]) -> tuple[Vector, jax.Array]:
        basis, triangle = carry
        extension = extend(basis, row(vectors, i), jax.random.fold_in(key, i))
        column = extension.coefficients.at[i].set(extension.length).astype(dtype)
        return set_row(basis, i, extension.unit), triangle.at[:, i].set(column)

    start = (tuple(jnp.zeros_like(x) for x in vectors), jnp.zeros((number, number), dtype))
    return jax.lax.fori_loop(0, number, one, start)


def check_at_most_dimension(name: str, value: int, size: int) -> None:
    """Raises if `value` directions are asked of a space with fewer."""
    checks.check_count(name, value, 1)
    if value > size:
        raise ValueError(
            f"{name}={value} exceeds the dimension {size}: only {size} parameters vary."
        )
