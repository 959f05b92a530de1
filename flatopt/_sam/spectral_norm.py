"""The ascent step that is steepest in the spectral norm of each matrix: SAM's for Muon."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, stage, tree_math
from flatopt._sam.ascent import climb_to_norm

# Coefficients of odd polynomials of degree five in the singular values. Muon's six lift those above
# a thousandth of the matrix's norm to between 0.7 and 1.2; three of Newton's end there at 1.
POLYNOMIALS = 6 * ((3.4445, -4.7750, 2.0315),) + 3 * ((1.875, -1.25, 0.375),)


def polar_factor(x: jax.Array) -> jax.Array:
    r""":math:`U V^\dagger` of :math:`x = U \Sigma V^\dagger`, by Newton-Schulz steps."""
    rows, columns = x.shape
    x = climb_to_norm(x, 1)  # No singular value is above 1, where the steps converge.
    x = x if rows <= columns else x.conj().T  # The products are of the shorter side.
    for a, b, c in POLYNOMIALS:
        square = x @ x.conj().T
        x = a * x + (b * square + c * square @ square) @ x
    return x if rows <= columns else x.conj().T


def climb_to_spectral_norm(grads: Any, rho: Any) -> Any:
    r""":math:`\rho \, U V^\dagger` of each matrix, :math:`\rho \, g / \|g\|` of each vector."""

    def leaf(g: jax.Array) -> jax.Array:
        if g.ndim < 2 or not g.size:
            return climb_to_norm(g, rho)
        wide = tree_math.replicate(g).astype(tree_math.accumulator_dtype(g.dtype))
        matrix = wide.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        factor = polar_factor(matrix).reshape(g.shape)
        # The sum lies where the leaf lies.
        return jnp.zeros_like(g) + (rho * factor).astype(g.dtype)

    return jax.tree.map(leaf, grads)


def scale_to_spectral_norm(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Turns each matrix of the gradient into the steepest step of a given spectral norm.

    .. math:: \epsilon_l = \rho \, U_l V_l^\top, \quad g_l = U_l \Sigma_l V_l^\top, \qquad
      \epsilon_l = \rho \, g_l / \|g_l\| \; \text{for vectors}

    Args:
      rho: spectral norm of each matrix's displacement and length of each vector's, >= 0: a number,
        a traced array, or a schedule of the step count (negative values count as 0).

    Returns:
      A perturbation; a matrix has the last axis of a leaf as its second, all others as its first.
      Zero gradients give zero, inf or NaN give NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.scale_to_spectral_norm(0.5)
      >>> grads = jnp.array([[3.0, 0.0], [0.0, -1.0]])
      >>> print(abs(perturbation.update(grads, perturbation.init(grads))[0]).round(4))
      [[0.5 0. ]
       [0.  0.5]]

    References:
      Bernstein, Newhouse. Old Optimizer, New Norm: An Anthology. arXiv:2409.20325

    Cost: 0 extra gradients; 0 copies (+2 temporary); 27 products of matrices a leaf.
    """
    checks.check_number("rho", rho, low=0.0)
    return stage.perturbation(climb_to_spectral_norm, rho=rho)
