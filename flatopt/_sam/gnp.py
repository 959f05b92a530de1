"""GNP (Zhao et al., arXiv:2202.03599): a penalty on the gradient norm, by two gradients mixed."""

import optax

from flatopt._core import checks
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.combiners import mix_clean
from flatopt._sam.gradient_at import ascent_stage


def gnp(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule = 0.8,
    *,
    normalise_clean: bool = False,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-norm penalty: descends :math:`L + \alpha \rho \|\nabla L\|`, to first order.

    .. math:: g \leftarrow (1 - \alpha) \, g + \alpha \, \nabla L(w + \rho \, g / \|g\|)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      alpha: the penalty's weight over rho: 1 is `sam`, 0.8 is usual. Likewise.
      normalise_clean: True mixes in the unit vector :math:`g / \|g\|` in place of g. That is the
        default of the authors' program, not their paper's formula; it changes the step size.
        Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.gnp(rho=0.5, alpha=0.8), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.324 -0.432 ]

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra per sharp update. State: three integers;
      two temporary copies of the parameters.
    """
    checks.check_number("rho", rho, low=0.0)
    combiner = mix_clean(alpha, normalise_clean=normalise_clean)
    return ascent_stage(rho, scale_to_norm(rho), combiner=combiner, start=start, every=every)
