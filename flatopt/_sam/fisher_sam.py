"""Fisher SAM (Kim et al., arXiv:2206.04920): the ascent is measured in the Fisher metric."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._sam.ascent import climb_to_adaptive_norm
from flatopt._sam.gradient_at import ascent_stage


def inverse_root_fisher(grads: Any, eta: Any) -> Any:
    r""":math:`F^{-1/2}` of the diagonal metric :math:`F = 1 + \eta g^2`, one number an entry."""

    def leaf(g: jax.Array) -> jax.Array:
        size = jnp.abs(g).astype(tree_math.scalar_dtype(g))
        return 1 / jnp.hypot(jnp.ones_like(size), jnp.sqrt(eta) * size)  # No square overflows.

    return jax.tree.map(leaf, grads)


def climb_to_fisher_norm(grads: Any, rho: Any, eta: Any) -> Any:
    r""":math:`\rho F^{-1} g / \sqrt{g^\top F^{-1} g}`: ASAM's formula with :math:`T^2 = F^{-1}`."""
    return climb_to_adaptive_norm(grads, inverse_root_fisher(grads, eta), rho)


def scale_to_fisher_norm(
    rho: optax.ScalarOrSchedule, eta: optax.ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a given length in the Fisher metric: Fisher SAM's ascent step.

    .. math:: \epsilon = \rho \, \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g} + 10^{-12}}, \qquad
      F = \mathrm{diag}(1 + \eta \, g^2)

    Args:
      rho: length in the metric, >= 0, :math:`\sqrt{\epsilon^\top F \epsilon}`: a number, a traced
        array, or a schedule of the step count (negative values of a schedule count as 0).
      eta: weight of the squared gradient in the metric, >= 0; 0 is `scale_to_norm`. Likewise.

    Returns:
      A perturbation. A zero gradient gives a zero displacement; inf or NaN give NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation, grads = flatopt.scale_to_fisher_norm(0.5), jnp.array([1.0, 2.0, 0.0])
      >>> print(perturbation.update(grads, perturbation.init(grads))[0])
      [0.219 0.175 0.   ]

    References:
      As for `fisher_sam`.

    Cost: 0 extra gradients; 0 copies (+2 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("eta", eta, low=0.0)
    return stage.perturbation(climb_to_fisher_norm, rho=rho, eta=eta)


@registry.method("stage", needs=("grad_fn",))
def fisher_sam(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 1.0,
    *,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: SAM in an ellipsoid that is short where the gradient of the batch is large.

    .. math:: g \leftarrow \nabla L(w + \epsilon), \qquad
      \epsilon = \rho \, \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad F = 1 + \eta \, g^2

    Args:
      rho: radius in the metric, >= 0: a number, a traced array, or a schedule.
      eta: weight of the squared gradient in the metric, >= 0; 0 is `sam`. Likewise.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.fisher_sam(rho=0.5), jnp.array([1.0, 2.0, 0.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [1.219 2.175 0.   ]

    References:
      Kim, Li, Hu, Hospedales. Fisher SAM: Information Geometry and Sharpness Aware Minimisation.
      arXiv:2206.04920

    Cost: 1 extra gradient; 0 copies (+2 temporary).
    """
    return ascent_stage(rho, scale_to_fisher_norm(rho, eta), start=start, every=every)
