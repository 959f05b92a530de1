"""VaSSO (Li and Giannakis, arXiv:2309.15639): the ascent follows the mean of past gradients."""

from typing import Any

import optax

from flatopt._core import checks
from flatopt._core.timing import value_at
from flatopt._sam.ascent import (
    follow_mean,
    gradient_ema_direction,
    scale_to_norm,
)
from flatopt._sam.gradient_at import ascent_stage


def smooth_gradient(
    decay: optax.ScalarOrSchedule, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its exponential moving average: VaSSO's steadier direction.

    .. math:: d_t = (1 - \theta) d_{t-1} + \theta g_t, \quad d_0 = 0

    Args:
      decay: :math:`1 - \theta`, in [0, 1): 0 is the gradient itself, 0.6 to 0.9 are usual. A
        number, a traced array, or a schedule of the step count.
      accumulator_dtype: dtype of the mean; None means float32 or that of the parameters, the wider.
        `jnp.bfloat16` halves the state. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`, which makes the missing debiasing
      immaterial. A gradient with inf or NaN is handed on but does not enter the mean.

    Raises:
      ValueError: if `decay` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.smooth_gradient(0.5)
      >>> state = direction.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])):
      ...     updates, state = direction.update(grads, state)
      >>> print(updates)
      [0.75 0.5 ]

    References:
      Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression.
      arXiv:2309.15639

    Notes:
      State: one copy of the parameters, one integer.
    """
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, ema: Any, step: Any) -> tuple[Any, Any]:
        mean = follow_mean(value_at(decay, step), ema.ema, grads)
        return optax.tree.cast_like(mean, grads), mean

    return gradient_ema_direction(direction, accumulator_dtype)


def vasso(
    rho: optax.ScalarOrSchedule,
    *,
    decay: optax.ScalarOrSchedule = 0.6,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: the ascent follows the mean of past gradients, to suppress the noise of the batch.

    .. math::
      g_t \leftarrow \nabla L(w + \rho \, d_t / \|d_t\|), \qquad
      d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      decay: :math:`1 - \theta`, in [0, 1); 0 is `sam`. Likewise.
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
      >>> tx = optax.chain(flatopt.vasso(rho=0.5), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.33 -0.44]

    References:
      Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression.
      arXiv:2309.15639

    Notes:
      The opposite of `friendly_sam`, which removes the mean that this one follows. Place: as for
      `sam`. Gradient evaluations: one extra per sharp update. State: one copy of the parameters,
      three integers; one temporary copy.
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(
        smooth_gradient(decay, accumulator_dtype=accumulator_dtype), scale_to_norm(rho)
    )
    return ascent_stage(rho, perturbation, start=start, every=every)
