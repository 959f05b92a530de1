"""Unified SAM (Oikonomou and Loizou, arXiv:2503.02225): an ascent between normalised and raw."""

from typing import Any

import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._sam.ascent import finite_norm
from flatopt._sam.gradient_at import ascent_stage


def climb_partly_normalised(grads: Any, rho: Any, lam: Any) -> Any:
    r""":math:`\rho \, (1 - \lambda + \lambda / \|g\|) \, g`."""
    inverse = 1 / (finite_norm(grads) + tree_math.EPSILON)
    return tree_math.scale(rho * (1 - lam + lam * inverse), grads)


def scale_by_partial_norm(
    rho: optax.ScalarOrSchedule, lam: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a displacement whose length depends on that of the gradient in part.

    .. math:: \epsilon = \rho \, \Big(1 - \lambda + \frac{\lambda}{\|g\| + 10^{-12}}\Big) \, g

    Args:
      rho: >= 0, the displacement's length where the gradient has length 1: a number, a traced
        array, or a schedule of the step count (negative values of a schedule count as 0).
      lam: :math:`\lambda`, in [0, 1]: 1 is `scale_to_norm`, 0 the gradient times rho. Likewise.

    Returns:
      A perturbation. A zero gradient gives a zero displacement; inf or NaN give NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation, grads = flatopt.scale_by_partial_norm(0.5, 0.25), jnp.array([3.0, 4.0])
      >>> print(perturbation.update(grads, perturbation.init(grads))[0])
      [1.2 1.6]

    References:
      As for `unified_sam`.

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("lam", lam, low=0.0, high=1.0)
    return stage.perturbation(climb_partly_normalised, rho=rho, lam=lam)


@registry.method("stage", needs=("grad_fn",))
def unified_sam(
    rho: optax.ScalarOrSchedule,
    lam: optax.ScalarOrSchedule = 0.5,
    *,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Unified SAM: an ascent step between SAM's, of fixed length, and that of the raw gradient.

    .. math:: g \leftarrow \nabla L\big(w + \rho \, (1 - \lambda + \lambda / \|g\|) \, g\big)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      lam: :math:`\lambda`, in [0, 1]: 1 is `sam`, 0 is unnormalised SAM. Likewise: the schedules
        1/t and 1 - 1/t are `lambda step: 1 / (step + 1)` and `lambda step: 1 - 1 / (step + 1)`.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.unified_sam(rho=0.5, lam=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.9 5.2]

    References:
      Oikonomou, Loizou. Sharpness-Aware Minimization: General Analysis and Improved Rates.
      arXiv:2503.02225

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    return ascent_stage(rho, scale_by_partial_norm(rho, lam), start=start, every=every)
