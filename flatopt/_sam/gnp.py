"""GNP (Zhao et al., arXiv:2202.03599): a penalty on the gradient norm, by two gradients mixed."""

import optax

from flatopt._core import checks, registry
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.combiners import mix_clean
from flatopt._sam.gradient_at import ascent_stage


@registry.method("stage", needs=("grad_fn",))
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
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      alpha: the penalty's weight over rho: 1 is `sam`, 0.8 is usual. Likewise.
      normalise_clean: True mixes in :math:`g / \|g\|` in place of g, which changes the step size:
        the default of the authors' program, not their paper's formula. Static.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.gnp(rho=0.5, alpha=0.8), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0].round(2))
      [3.24 4.32]

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Cost: 1 extra gradient; 0 copies (+2 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    combiner = mix_clean(alpha, normalise_clean=normalise_clean)
    return ascent_stage(rho, scale_to_norm(rho), combiner=combiner, start=start, every=every)
