"""The Lanczos process with full re-orthogonalisation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import tree_math
from flatopt.measures import _basis
from flatopt.measures._basis import TINY
from flatopt.measures._operator import power_of_two
from flatopt.measures._variables import Vector


class Process(NamedTuple):
    """A Lanczos process after `size` products: `basis^T H basis` is tridiagonal.

    Attributes:
      basis: orthonormal vectors on the leading axis; zeros where none is yet.
      diagonal: diagonal of the tridiagonal matrix.
      beside: entries beside the diagonal; the last is the coupling to what was not explored.
      size: int32 scalar.
      scale: power of two in whose units the entries are, by the first product.
    """

    basis: Vector
    diagonal: jax.Array
    beside: jax.Array
    size: jax.Array
    scale: jax.Array


class Ritz(NamedTuple):
    """Eigenpairs of the tridiagonal matrix in units of `scale`; those not `valid` are unknown."""

    values: jax.Array
    rotation: jax.Array
    valid: jax.Array
    residuals: jax.Array


def begin(start: Vector, num_steps: int) -> Process:
    """A process that starts from the unit vector `start`."""
    basis = _basis.set_row(_basis.zeros(start, num_steps), 0, start)
    zeros = jnp.zeros(num_steps, tree_math.scalar_dtype(start))
    return Process(basis, zeros, zeros, jnp.zeros([], jnp.int32), jnp.ones([], zeros.dtype))


@jax.jit
def advance(process: Process, product: Vector, key: jax.Array) -> Process:
    """The process after one more step; `product` is the matrix times the newest vector."""
    basis, diagonal, beside, i, scale = process
    scale = jnp.where(i == 0, power_of_two(product).astype(scale.dtype), scale)
    product = tree_math.scale(1 / scale, product)
    rest = _basis.extend(basis, product, jax.random.fold_in(key, i))
    diagonal = diagonal.at[i].set(rest.coefficients[i])
    beside = beside.at[i].set(rest.length)
    # After the last step there is no room, and the last vector stays.
    last = len(diagonal) - 1
    following = jnp.minimum(i + 1, last)
    kept = _basis.row(basis, following)
    newest = optax.tree.where(i < last, rest.unit, kept)
    basis = _basis.set_row(basis, following, newest)
    return Process(basis, diagonal, beside, i + 1, scale)


@jax.jit
def ritz(process: Process) -> Ritz:
    """Eigenpairs of the tridiagonal matrix of the steps so far."""
    _, diagonal, beside, size, _ = process
    steps = jnp.arange(len(diagonal))
    bound = jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(beside)
    # What is not there yet gets one eigenvalue beyond all others, by which it is recognised.
    filler = 4 * bound + TINY
    inner = jnp.where(steps[:-1] + 1 < size, beside[:-1], 0.0)
    matrix = jnp.diag(jnp.where(steps < size, diagonal, filler))
    values, rotation = jnp.linalg.eigh(matrix + jnp.diag(inner, 1) + jnp.diag(inner, -1))
    last = jnp.maximum(size - 1, 0)
    residuals = jnp.abs(beside[last] * rotation[last])
    return Ritz(values, rotation, ~(values > filler / 2), residuals)


def explore(
    multiply: Callable[[Vector], Vector],
    start: Vector,
    num_steps: int,
    key: jax.Array,
    loops: _batches.Loops,
    finished: Callable[[Process], Any] | None = None,
) -> Process:
    """Runs `num_steps` steps, or fewer when `finished`."""

    def going_on(process: Process) -> Any:
        # NaN does not heal: to go on would only cost time.
        fine = (process.size < num_steps) & jnp.all(jnp.isfinite(process.diagonal))
        return fine if finished is None else fine & ~finished(process)

    def body(process: Process) -> Process:
        newest = _basis.row(process.basis, process.size)
        return advance(process, multiply(newest), key)

    return loops.run_while(going_on, body, begin(start, num_steps))
