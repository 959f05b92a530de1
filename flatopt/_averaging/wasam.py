"""WASAM (Kaddour et al., arXiv:2202.00661): SAM's iterates, evaluated at their running mean."""

from typing import Any

import optax

from flatopt._averaging.swa import swa
from flatopt._core import checks, registry
from flatopt._sam.sam import sam


@registry.method("wrapper", needs=("grad_fn",))
def wasam(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight-averaged SAM: SAM's iterates, evaluated at their running mean.

    .. math:: w_{t+1} = w_t + u\big(\nabla L(w_t + \rho \, g_t / \|g_t\|)\big)

    Args:
      optimizer: any optax transformation.
      rho: radius of `sam`, >= 0: a number, a traced array, or a schedule of the step count.
      start, every, accumulator_dtype: of the mean; see `swa`. The authors take it once an epoch.

    Returns:
      `optax.chain(sam(rho), optimizer, swa(...))`; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.wasam(optax.sgd(0.5), rho=0.1), jnp.array(1.0)
      >>> grad_fn, opt_state = flatopt.make_grad_fn(lambda w: 0.5 * w**2), tx.init(w)
      >>> updates, opt_state = tx.update(grad_fn(w), opt_state, w, grad_fn=grad_fn)
      >>> print(f"{flatopt.eval_params(opt_state, w):.4f}")
      0.4500

    References:
      Kaddour, Liu, Silva, Kusner. When Do Flat Minima Optimizers Work? arXiv:2202.00661

    Cost: 1 extra gradient; 1 copy.
    """
    mean = swa(start=start, every=every, accumulator_dtype=accumulator_dtype)
    return optax.chain(sam(rho), checks.as_transformation("optimizer", optimizer), mean)
