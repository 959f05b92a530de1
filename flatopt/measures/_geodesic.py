"""Geodesics between networks whose units are normalised: paths that no rescaling bends."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt.measures import _barrier, _symmetry, _variables
from flatopt.measures._barrier import Barrier
from flatopt.measures._symmetry import Units

_SMALL = 1e-3  # Angles below which the arc is a straight line to rounding.


def geodesic(
    params: optax.Params,
    other_params: optax.Params,
    position: jax.typing.ArrayLike,
    units: Sequence[Units],
    *,
    normalise_output: bool = False,
) -> optax.Params:
    r"""A point of the path that turns every hidden unit along the shortest arc.

    .. math:: v(t) = \ell(t) \, \frac{\sin((1 - t) \theta) \, u + \sin(t \theta) \, u'}
       {\sin \theta}, \quad \cos \theta = u \cdot u', \quad \ell(t) = (1 - t) \|v\| + t \|v'\|

    with u, u' the directions of one unit's incoming weights, or of all that lead to no hidden unit.

    Args:
      params, other_params, position: networks of the same shapes, and t in [0, 1], 0 at the first.
      units, normalise_output: `chain_units(params)`; whether all else has length 1 always. Static.

    Returns:
      A tree like `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.geodesic(jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0]), 0.5, units=()))
      [1.414 1.414]

    References:
      Pittorino and others. Deep Networks on Toroids. arXiv:2202.03038

    Cost: nothing.
    """
    _variables.check_alike("other_params", other_params, params)
    ours, theirs = _symmetry.by_path(params), _symmetry.by_path(other_params)
    result = dict(ours)
    inside: set[str] = set()
    t = jnp.asarray(position)
    for group in _symmetry.check_units(ours, units):
        if inside & {path for path, _ in group.incoming}:
            raise ValueError(
                "units names one leaf as incoming of two sets: it turns on one sphere only."
            )
        inside |= {path for path, _ in group.incoming}
        first_weight, second_weight = _weights(group.incoming, ours, theirs, t)
        for path, axis in group.incoming:
            a, b = ours[path], theirs[path]
            first = _symmetry.along(first_weight, a, axis)
            second = _symmetry.along(second_weight, a, axis)
            result[path] = first * a + second * b
    rest = [path for path in ours if path not in inside]
    if rest:
        slots = tuple((path, None) for path in rest)
        first_weight, second_weight = _weights(slots, ours, theirs, t)
        if normalise_output:
            length = (1 - t) * jnp.sqrt(_sum(slots, ours, ours))
            length = length + t * jnp.sqrt(_sum(slots, theirs, theirs))
            scale = jnp.where(length > 0, length, 1.0)
            first_weight, second_weight = first_weight / scale, second_weight / scale
        for path in rest:
            first, second = (w.astype(ours[path].dtype) for w in (first_weight, second_weight))
            result[path] = first * ours[path] + second * theirs[path]
    return jax.tree.unflatten(jax.tree.structure(params), list(result.values()))


def _sum(slots: Sequence[tuple[str, int | None]], x: Any, y: Any) -> jax.Array:
    """Scalar products over leaves: one for each index of the axis, or one in all."""
    terms = [
        jnp.sum(x[p] * y[p]) if axis is None else _symmetry.sum_others(x[p] * y[p], axis)
        for p, axis in slots
    ]
    return jnp.sum(jnp.stack(terms), axis=0)


def _weights(
    slots: Sequence[tuple[str, int | None]], ours: Any, theirs: Any, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weights at t of the vectors in the `slots`, one for each index of the axis."""
    products = _sum(slots, ours, ours), _sum(slots, theirs, theirs), _sum(slots, ours, theirs)
    return _arc(*products, t)


def _arc(
    square: jax.Array, other_square: jax.Array, product: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weights of the two vectors at t, from their squared lengths and scalar product."""
    lengths = jnp.sqrt(square), jnp.sqrt(other_square)
    both = lengths[0] * lengths[1]
    known = both > 0
    cosine = jnp.clip(product / jnp.where(known, both, 1.0), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    # Parallel, opposite or missing directions have no shortest arc of their own: a straight line.
    curved = known & (angle > _SMALL) & (angle < jnp.pi - _SMALL)
    safe = jnp.where(curved, angle, 1.0)
    length = (1 - t) * lengths[0] + t * lengths[1]
    first = length * jnp.sin((1 - t) * safe) / (jnp.sin(safe) * jnp.where(known, lengths[0], 1.0))
    second = length * jnp.sin(t * safe) / (jnp.sin(safe) * jnp.where(known, lengths[1], 1.0))
    return jnp.where(curved, first, 1 - t), jnp.where(curved, second, t)


@dataclasses.dataclass(frozen=True)
class _Path:
    units: tuple[Units, ...]
    normalise_output: bool

    def __call__(self, params: Any, other: Any, position: jax.Array) -> Any:
        return geodesic(params, other, position, self.units, normalise_output=self.normalise_output)


def geodesic_barrier(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    units: Sequence[Units],
    normalise_output: bool = False,
    num_points: int = 25,
) -> Barrier:
    r"""The rise of the loss, or of the error, on the geodesic between two networks.

    .. math:: \max_{t \in [0, 1]} \, L(w(t)) - (1 - t) L(w) - t L(w')

    Args:
      loss_fn, batches, weights: a loss or an error, and the data; see `hessian_vector_product`.
      params, other_params: the first network and the second, of the same shapes.
      units, normalise_output, num_points: see `geodesic`; points, >= 2, ends included. Static.

    Returns:
      `Barrier`: height, positions and losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> loss_fn, ends = lambda w: (w @ w - 1) ** 2, jnp.eye(2)  # Zero on the circle.
      >>> barrier = measures.geodesic_barrier(loss_fn, *ends, units=())
      >>> print(f"{measures.linear_barrier(loss_fn, *ends).height:.3f} {barrier.height:.3f}")
      0.250 0.000

    References:
      Pittorino and others. Deep Networks on Toroids. arXiv:2202.03038

    Cost: `num_points` losses over the data.
    """
    data = _batches.weigh(batches, weights)
    path = _Path(tuple(units), normalise_output)
    return _barrier.profile(loss_fn, params, other_params, data, num_points, path)
