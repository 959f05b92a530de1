"""LAWA (Kaddour, arXiv:2209.14981): the mean of the latest few models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring
from flatopt._core import checks, means, stage, tree_math
from flatopt._core.timing import Every


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken so far, also those overwritten since.
      ring: as in `SnapshotsState`.
    """

    step: jax.Array
    number: jax.Array
    ring: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean of the models in the ring, or `params` before the first."""
        shares = ring.weights(self.number, ring.size(self.ring))

        def leaf(stack: jax.Array) -> jax.Array:
            length = stack.shape[0]
            if not jnp.issubdtype(stack.dtype, jnp.inexact):
                return stack[(self.number - 1) % length]
            wide = stack.astype(tree_math.accumulator_dtype(stack.dtype))
            column = shares.astype(wide.real.dtype).reshape(length, *[1] * (stack.ndim - 1))
            return jnp.sum(column * wide, axis=0)

        return means.evaluated(jax.tree.map(leaf, self.ring), params, self.number > 0)


def lawa(
    window: int, *, start: int | None = None, every: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Latest weight averaging: the mean of the latest few models.

    .. math::
      \bar w = \frac{1}{m} \sum_{i=n-m}^{n-1} w_{t_i}, \qquad t_i = (i + 1) \, every, \quad
      m = \min(n, window)

    Args:
      window: how many models the mean takes in, >= 1. Static.
      every: a model is taken after updates `every`, `2 every`, ..., >= 1; None means each. Static.
      start: before the first model at or after this update, `eval_params` gives the parameters
        themselves, >= 0; None means 0. The mean then takes in earlier models too. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      mean with `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.lawa(2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      2.5

    References:
      Kaddour. Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
      Averaging. arXiv:2209.14981

    Notes:
      Forgets what is older than `window * every` updates, so it needs no guess at when to start; an
      average of a decaying run that lags behind it can be worse than its last point. The models are
      kept in the parameters' own dtypes and averaged in float32 at least. Gradient evaluations:
      none. State: `window` copies of the parameters and three scalars. Other weights than equal
      ones: `snapshots` with `merge_params(stack, merge_weights("cosine", number))`.
    """
    checks.check_count("window", window, 1)

    def init_fn(params: optax.Params) -> LawaState:
        return LawaState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ring=ring.empty(params, window),
        )

    return stage.observer("lawa", init_fn, ring.collect, Every.after_update(start, every))
