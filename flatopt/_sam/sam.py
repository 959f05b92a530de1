"""SAM (Foret et al., arXiv:2010.01412): descend with the gradient at the top of a small ascent."""

import optax

from flatopt._core import checks, registry
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


@registry.method("stage", needs=("grad_fn",))
def sam(
    rho: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation: descend with the gradient at the top of a small ascent step.

    .. math:: g \leftarrow \nabla L\big(w + \rho \, g / (\|g\| + 10^{-12})\big)

    Args:
      rho: radius, >= 0, in units of the parameters' norm; 0.05 to 0.2 are usual. The number 0: the
        identity, without a gradient.
      start, every, record: when it acts, and what it keeps of it; see `gradient_at`.

    Returns:
      A stage for in front of an optimiser (alone, it steps uphill); needs `params`, `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = optax.chain(flatopt.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
      >>> params, batch = jnp.array([1.0, -2.0]), jnp.eye(2)
      >>> grad_fn = flatopt.make_grad_fn(lambda w, x: jnp.mean((x @ w) ** 2), batch)
      >>> print(tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0])
      [-0.1022  0.2045]

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    return ascent_stage(rho, scale_to_norm(rho), start=start, every=every, record=record)
