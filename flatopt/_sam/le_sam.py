"""LE-SAM (Wang et al., arXiv:2605.10183): the ascent raises the loss by a fixed amount."""

from typing import Any

import jax.numpy as jnp
import optax

from flatopt._core import checks, stage, tree_math
from flatopt._sam.gradient_at import ascent_stage


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
      A transformation from gradients to displacements of the same dtypes. A zero gradient gives a
      zero displacement; an inf or NaN in the gradient gives NaN.

    Raises:
      ValueError: if `budget` or `max_rho` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.scale_to_loss_rise(budget=1.0, max_rho=0.5)
      >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])):
      ...     print(perturbation.update(grads, perturbation.init(grads))[0])
      [0.12 0.16]
      [0.3 0.4]

    References:
      Wang, Liu, Xie, Gao. Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
      Sharpness-Aware Minimization. arXiv:2605.10183

    Notes:
      Gradient evaluations: none of its own. State: one integer.
    """
    checks.check_number("budget", budget, low=0.0)
    checks.check_number("max_rho", max_rho, low=0.0)

    def displace(grads: Any, budget: Any, max_rho: Any) -> Any:
        norm = tree_math.norm(grads) + tree_math.EPSILON
        return tree_math.scale(jnp.minimum(budget / norm, max_rho) / norm, grads)

    return stage.perturbation(displace, budget=budget, max_rho=max_rho)


def le_sam(
    budget: optax.ScalarOrSchedule,
    max_rho: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Loss-equated SAM: the ascent raises the loss by a fixed amount, not the weights' distance.

    .. math::
      g \leftarrow \nabla L(w + \rho \, g / \|g\|), \qquad \rho = \min(\sigma / \|g\|, \rho_{max})

    Args:
      budget: :math:`\sigma`, rise of the linearised loss, >= 0, in units of the loss: a number, a
        traced array, or a schedule of the step count; the authors let it fall to 0 at the end. With
        the number 0 the stage is the identity and takes no gradient.
      max_rho: longest ascent step, >= 0: likewise.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.le_sam(budget=1.0, max_rho=0.5), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.312 -0.416]

    References:
      Wang, Liu, Xie, Gao. Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
      Sharpness-Aware Minimization. arXiv:2605.10183

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra per sharp update. State: two integers;
      one temporary copy of the parameters.
    """
    perturbation = scale_to_loss_rise(budget, max_rho)
    return ascent_stage(budget, perturbation, start=start, every=every)
