"""ASAM (Kwon et al., arXiv:2102.11600): SAM whose step is measured in units of the weights."""

from typing import Any

import optax

from flatopt._core import registry
from flatopt._sam.ascent import scale_to_adaptive_norm
from flatopt._sam.gradient_at import ascent_stage


@registry.method("stage", needs=("grad_fn",))
def asam(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.01,
    *,
    mask: Any = None,
    start: int | None = None,
    every: int | None = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ascent step is measured in units of the weights.

    .. math:: g \leftarrow \nabla L\big(w + \rho \, T^2 g / (\|T g\| + 10^{-12})\big), \qquad
      T = \mathrm{diag}(|w| + \eta)

    Args:
      rho: radius, >= 0, in units of `T`: about ten times that of `sam`, 0.5 to 2 are usual.
      eta: added to `|w|`, >= 0: a number, a traced array, or a schedule, like `rho`.
      mask: where `T` applies; see `scale_to_adaptive_norm`. Static.
      start, every, record: when it acts, and what it keeps of it; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.asam(rho=0.5), jnp.array([1.0, -2.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [ 1.123 -2.975]

    References:
      Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks. arXiv:2102.11600

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    return ascent_stage(
        rho, scale_to_adaptive_norm(rho, eta, mask=mask), start=start, every=every, record=record
    )
