"""LE-SAM (Wang et al., arXiv:2605.10183): the ascent raises the loss by a fixed amount."""

from typing import Any

import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._sam.ascent import finite_norm
from flatopt._sam.gradient_at import ascent_stage


def climb_to_loss_rise(grads: Any, budget: Any, max_rho: Any) -> Any:
    r""":math:`\min(\sigma / \|g\|, \rho_{max}) \, g / \|g\|`, with sigma = `budget`."""
    norm = finite_norm(grads) + tree_math.EPSILON
    return tree_math.scale(jnp.minimum(budget / norm, max_rho) / norm, grads)


def scale_to_loss_rise(
    budget: optax.ScalarOrSchedule, max_rho: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to the displacement that raises the linearised loss by a given amount.

    .. math:: \epsilon = \min(\sigma / \|g\|, \rho_{max}) \, g / \|g\|

    Args:
      budget: :math:`\sigma`, the rise of the loss, >= 0, in units of the loss: a number, a traced
        array, or a schedule of the step count (negative values of a schedule count as 0).
      max_rho: the longest displacement, >= 0: likewise.

    Returns:
      A perturbation. A zero gradient gives a zero displacement; inf or NaN give NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.scale_to_loss_rise(budget=1.0, max_rho=0.5)
      >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])):
      ...     print(perturbation.update(grads, perturbation.init(grads))[0])
      [0.12 0.16]
      [0.3 0.4]

    References:
      As for `le_sam`.

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("budget", budget, low=0.0)
    checks.check_number("max_rho", max_rho, low=0.0)
    return stage.perturbation(climb_to_loss_rise, budget=budget, max_rho=max_rho)


@registry.method("stage", needs=("grad_fn",))
def le_sam(
    budget: optax.ScalarOrSchedule,
    max_rho: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Loss-equated SAM: the ascent raises the loss by a fixed amount, not the weights' distance.

    .. math:: g \leftarrow \nabla L(w + \rho \, g / \|g\|), \qquad
      \rho = \min(\sigma / \|g\|, \rho_{max})

    Args:
      budget: :math:`\sigma`, rise of the linearised loss, >= 0, in units of the loss: a number, a
        traced array, or a schedule. With the number 0 the stage is the identity.
      max_rho: longest ascent step, >= 0: likewise.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.le_sam(budget=1.0, max_rho=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.12 4.16]

    References:
      Wang, Liu, Xie, Gao. Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
      Sharpness-Aware Minimization. arXiv:2605.10183

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    perturbation = scale_to_loss_rise(budget, max_rho)
    return ascent_stage(budget, perturbation, start=start, every=every)
