"""LAWA (Kaddour, arXiv:2209.14981): the mean of the latest few models."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring as _ring
from flatopt._core import checks, means, registry, stage, tree_math
from flatopt._core.timing import Every


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken so far, also those overwritten since.
      ring: tree like the parameters with one more axis in front: the latest models; model i (from
        0) lies in slot i modulo the length of the axis.
    """

    step: jax.Array
    number: jax.Array
    ring: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean of the models in the ring, or `params` before the first."""
        return means.evaluated(mean_of_latest(self.ring, self.number), params, self.number > 0)


def mean_of_latest(ring: optax.Params, number: jax.Array) -> optax.Params:
    r""":math:`\frac1m \sum_i w_i` over the m models in the ring, in float32 at least."""
    shares = _ring.weights(number, _ring.size(ring))

    def leaf(stack: jax.Array) -> jax.Array:
        length = stack.shape[0]
        if not jnp.issubdtype(stack.dtype, jnp.inexact):
            return stack[(number - 1) % length]
        wide = stack.astype(tree_math.accumulator_dtype(stack.dtype))
        column = shares.astype(wide.real.dtype).reshape(length, *[1] * (stack.ndim - 1))
        return jnp.sum(column * wide, axis=0)

    return jax.tree.map(leaf, ring)


@registry.method("average")
def lawa(
    window: int,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Latest weight averaging: the mean of the latest few models.

    .. math:: \bar w = \frac{1}{m} \sum_{i=n-m+1}^{n} w_{t_i}, \qquad m = \min(n, window)

    Args:
      window: how many models the mean takes in, >= 1. Static.
      start, every, accumulator_dtype: see `swa`; None keeps models in the parameters' dtypes.

    Returns:
      A stage to be chained last, as `swa`; needs `params`. The mean is summed in float32 at least.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.lawa(2), jnp.array(0.0)
      >>> state = stage.init(zero)
      >>> for w in jnp.array([1.0, 2.0, 3.0]):  # the weights after each update
      ...     _, state = stage.update(zero, state, w)
      >>> print(flatopt.eval_params(state, w))
      2.5

    References:
      Kaddour. Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
      Averaging. arXiv:2209.14981

    Cost: 0 extra gradients; `window` copies.
    """
    checks.check_count("window", window, 1)

    def init_fn(params: optax.Params) -> LawaState:
        return LawaState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ring=_ring.empty(params, window, accumulator_dtype),
        )

    collect = functools.partial(_ring.collect, "lawa", "window", window)
    return stage.observer("lawa", init_fn, collect, Every.after_update(start, every))
