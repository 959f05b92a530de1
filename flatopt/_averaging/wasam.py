"""WASAM (Kaddour et al., arXiv:2202.00661): SAM's iterates, evaluated at their running mean."""

import optax

from flatopt._averaging.swa import swa
from flatopt._sam.sam import sam


def wasam(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight-averaged SAM: SAM's iterates, evaluated at their running mean.

    .. math::
      w_{t+1} = w_t + u\big(\nabla L(w_t + \rho g_t / \|g_t\|)\big), \qquad
      \bar w = \text{mean of } w_t, \; t = start, start + every, \dots

    Args:
      optimizer: any optax transformation.
      rho: radius of `sam`, >= 0: a number, a traced array, or a schedule of the step count.
      start: number of the first update, counted from 1, whose weights enter the mean; see `swa`.
        Static.
      every: one in `every` updates from there on; the authors average at the end of each epoch.
        Static.

    Returns:
      `optax.chain(sam(rho), optimizer, swa(start=..., every=...))`; `update` needs `params` and
      `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * w**2)
      >>> tx = flatopt.wasam(optax.sgd(0.5), rho=0.1)
      >>> params = jnp.array(1.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.4f} {flatopt.eval_params(opt_state, params):.4f}")
      0.1750 0.3125

    References:
      Kaddour, Liu, Silva, Kusner. When Do Flat Minima Optimizers Work? arXiv:2202.00661

    Notes:
      Gradient evaluations: one extra per update. State: that of `optimizer`, one copy of the
      parameters and a few scalars.
    """
    return optax.chain(sam(rho), optimizer, swa(start=start, every=every))
