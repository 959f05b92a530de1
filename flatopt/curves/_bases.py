"""Bases: the coefficients of a curve's control points at a position."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flatopt._core import checks

# (position in [0, 1], number of control points) -> their coefficients
Basis = Callable[[jax.typing.ArrayLike, int], jax.Array]


def bezier(position: jax.typing.ArrayLike, num_bends: int) -> jax.Array:
    r"""Coefficients of the control points of a Bezier curve, which passes through its ends alone.

    .. math:: c_j(t) = \binom{n}{j} t^j (1 - t)^{n - j}, \qquad n = num\_bends - 1

    Args:
      position: t in [0, 1].
      num_bends: number of control points, ends included, >= 2. Static.

    Returns:
      [num_bends] coefficients that sum to 1.

    Examples:
      >>> from flatopt import curves
      >>> print(curves.bezier(0.5, 3))
      [0.25 0.5  0.25]

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Cost: 0 losses.
    """
    checks.check_count("num_bends", num_bends, 2)
    t = jnp.asarray(position, jnp.result_type(float))
    coefficients = [jnp.ones([], t.dtype)]
    for _ in range(num_bends - 1):  # One degree higher: de Casteljau's recursion.
        left = [(1 - t) * c for c in coefficients] + [jnp.zeros([], t.dtype)]
        right = [jnp.zeros([], t.dtype)] + [t * c for c in coefficients]
        coefficients = [a + b for a, b in zip(left, right, strict=True)]
    return jnp.stack(coefficients)


def polychain(position: jax.typing.ArrayLike, num_bends: int) -> jax.Array:
    r"""Coefficients of the control points of a chain of straight lines through all of them.

    .. math:: c_j(t) = \max(0, 1 - |n t - j|), \qquad n = num\_bends - 1

    Args:
      position, num_bends: t and the number of control points; see `bezier`.

    Returns:
      [num_bends] coefficients that sum to 1.

    Examples:
      >>> from flatopt import curves
      >>> print(curves.polychain(0.25, 3))
      [0.5 0.5 0. ]

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Cost: 0 losses.
    """
    checks.check_count("num_bends", num_bends, 2)
    t = jnp.asarray(position, jnp.result_type(float))
    return jnp.maximum(0.0, 1 - jnp.abs(t * (num_bends - 1) - jnp.arange(num_bends)))
