"""Friendly-SAM (Li et al., arXiv:2403.12350): the ascent follows the noise of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks
from flatopt._core.timing import value_at
from flatopt._sam.ascent import (
    follow_mean,
    gradient_ema_direction,
    scale_to_adaptive_norm,
    scale_to_norm,
)
from flatopt._sam.gradient_at import ascent_stage


def subtract_gradient_ema(
    sigma: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts the mean of past gradients, which leaves the noise of the batch: Friendly-SAM.

    .. math::
      d_t = g_t - \sigma m_{t-1}, \qquad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \quad m_0 = 0, \quad m_1 = g_1

    Args:
      sigma: share of the mean to subtract, >= 0; 1 is usual, 0 is the gradient itself. A number, a
        traced array, or a schedule of the step count.
      decay: :math:`\lambda`, in [0, 1); 0.6 to 0.9 are usual. Likewise.
      accumulator_dtype: dtype of the mean; None means float32 or that of the parameters, the wider.
        `jnp.bfloat16` halves the state. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`. A gradient with inf or NaN is handed on
      but does not enter the mean.

    Raises:
      ValueError: if `sigma` or `decay` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.subtract_gradient_ema(sigma=1.0, decay=0.9)
      >>> state = direction.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 2.0]), jnp.array([1.5, 1.0])):
      ...     updates, state = direction.update(grads, state)
      >>> print(updates, state.ema)
      [ 0.5 -1. ] [1.05 1.9 ]

    References:
      Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. arXiv:2403.12350

    Notes:
      The mean starts at the first gradient and is not debiased, as in the authors' code. With
      batches of the whole data set the difference is that of two iterates, and points anywhere.
      State: one copy of the parameters, one integer.
    """
    checks.check_number("sigma", sigma, low=0.0)
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, ema: Any, step: Any) -> tuple[Any, Any]:
        weight, keep = value_at(sigma, step), value_at(decay, step)
        d = jax.tree.map(lambda g, m: (g - weight * m).astype(g.dtype), grads, ema.ema)
        keep = jnp.where(ema.step == 0, 0, keep)
        return d, follow_mean(keep, ema.ema, grads)

    return gradient_ema_direction(direction, accumulator_dtype)


def friendly_sam(
    rho: optax.ScalarOrSchedule,
    *,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.9,
    adaptive: bool = False,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly-SAM: the ascent follows the noise of the batch, not its mean gradient.

    .. math::
      g_t \leftarrow \nabla L(w + \rho \, d_t / \|d_t\|), \qquad d_t = g_t - \sigma m_{t-1}, \qquad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      sigma: share of the mean to subtract, >= 0; 0 is `sam`. Likewise.
      decay: :math:`\lambda`, in [0, 1); 0.6 to 0.9 are usual. Likewise.
      adaptive: True: the ascent step is `scale_to_adaptive_norm(rho)`. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Others do not enter the mean.
        Static.
      accumulator_dtype: dtype of the mean; None means float32 or that of the parameters, the wider.
        `jnp.bfloat16` halves the state. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.friendly_sam(rho=0.5), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.33 -0.44]

    References:
      Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. arXiv:2403.12350

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra per sharp update. State: one copy of the
      parameters, three integers; one temporary copy.
    """
    checks.check_number("rho", rho, low=0.0)
    ascent = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    perturbation = optax.chain(
        subtract_gradient_ema(sigma, decay, accumulator_dtype=accumulator_dtype), ascent
    )
    return ascent_stage(rho, perturbation, start=start, every=every)
