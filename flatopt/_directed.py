"""SAM with another ascent step: Friendly-SAM, VaSSO, ZSharp, LE-SAM."""

from typing import Any

import optax

from flatopt import _checks
from flatopt._directions import keep_large_zscores, smooth_gradient, subtract_gradient_ema
from flatopt._gradient_at import ascent_stage
from flatopt._perturbations import scale_to_adaptive_norm, scale_to_loss_rise, scale_to_norm


def friendly_sam(
    rho: optax.ScalarOrSchedule,
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
    _checks.check_number("rho", rho, low=0.0)
    ascent = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    perturbation = optax.chain(subtract_gradient_ema(sigma, decay, accumulator_dtype), ascent)
    return ascent_stage(rho, perturbation, start=start, every=every)


def vasso(
    rho: optax.ScalarOrSchedule,
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
    _checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(smooth_gradient(decay, accumulator_dtype), scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)


def zsharp(
    rho: optax.ScalarOrSchedule,
    quantile: float = 0.95,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ZSharp: the ascent follows only the entries of the gradient that stand out in their layer.

    .. math::
      g \leftarrow \nabla L(w + \rho \, d / \|d\|), \qquad d_i = g_i \, [\,|z_i| \ge Q_q(|z|)\,]

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      quantile: q, in [0, 1): the share of each leaf's entries to leave out; 0 is `sam`. A number or
        a traced array.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.zsharp(rho=0.5, quantile=0.5), optax.sgd(0.1))
      >>> params = jnp.array([0.1, 4.0, -0.1, -4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.01   -0.4354  0.01    0.4354]

    References:
      Yun. Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks.
      arXiv:2505.02369

    Notes:
      The quantile is that of each leaf: see `keep_large_zscores`. Place: as for `sam`. Gradient
      evaluations: one extra per sharp update. State: two integers; one temporary copy of the
      parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(keep_large_zscores(quantile), scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)


def le_sam(
    budget: optax.ScalarOrSchedule,
    max_rho: optax.ScalarOrSchedule,
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
