"""The rise of the loss when weights are rounded to few bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks
from flatopt.measures import _variables
from flatopt.measures._variables import Mask, Variables

MOST_BITS = 16


def quantise(
    params: optax.Params, bits: int = 8, *, per_channel: bool = True, mask: Mask = None
) -> optax.Params:
    r"""Rounds weights to a symmetric grid of equal steps.

    .. math:: q(w) = s \, \mathrm{round}(w / s), \qquad s = \max |w| / (2^{bits - 1} - 1)

    Args:
      params: tree of weights.
      bits: in [2, 16]; 8 and 4 are usual. Static.
      per_channel: True: one step for each index of the last axis (each output unit of a kernel);
        False: one for each leaf. Static.
      mask: which leaves to round; see `hessian_vector_product`. None: those with two axes or more,
        as is usual; biases and scales stay. Static.

    Returns:
      A tree like `params`, in the same dtypes.

    Raises:
      ValueError: if `bits` is out of range or the mask does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.quantise(jnp.array([[0.9], [0.35], [-1.0]]), bits=2).ravel())
      [ 1.  0. -1.]

    References:
      Jacob et al. Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference. arXiv:1712.05877

    Notes:
      Rounding to nearest, no calibration; activations are not rounded. Zero stays zero.
    """
    _check_bits(bits)
    variables = _variables.select(params, _kernels if mask is None else mask)
    levels = 2 ** (bits - 1) - 1

    def leaf(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1)) if per_channel and x.ndim > 1 else None
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        step = jnp.where(largest > 0, largest, 1.0) / levels
        return step * jnp.round(x / step)

    rounded = variables.put(params, tuple(leaf(x) for x in variables.take(params)))
    return optax.tree.cast_like(rounded, params)


def _kernels(params: Any) -> Any:
    """Marks the leaves with two axes or more; all, if there is none."""
    marks = jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
    return marks if any(jax.tree.leaves(marks)) else True


def _check_bits(bits: int) -> None:
    checks.check_count("bits", bits, 2)
    if bits > MOST_BITS:
        raise ValueError(f"bits={bits} is out of range: it must be in [2, {MOST_BITS}].")


@dataclasses.dataclass(frozen=True)
class _Gap:
    loss_fn: _batches.LossFn
    variables: Variables
    bits: int
    per_channel: bool

    def __call__(self, mean: _batches.Mean, loops: _batches.Loops, params: Any) -> jax.Array:
        del loops
        mask = jax.tree.unflatten(jax.tree.structure(params), self.variables.flags)
        rounded = quantise(params, self.bits, per_channel=self.per_channel, mask=mask)
        points = (self.variables.put(p, self.variables.take(p)) for p in (params, rounded))
        before, after = (mean(_batches.Call(self.loss_fn), point) for point in points)
        return after - before


def quantisation_gap(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    bits: int = 8,
    per_channel: bool = True,
    mask: Mask = None,
) -> jax.Array:
    r"""The rise of the loss when the weights are rounded to few bits.

    .. math:: L(q(w)) - L(w)

    Args:
      loss_fn: loss or error, `loss_fn(params, batch)`; `loss_fn(params)` if `batches` is None.
        Static.
      params: where to measure.
      batches, weights: the data; see `hessian_vector_product`.
      bits: in [2, 16]; 8 and 4 are usual. Static.
      per_channel: one grid for each output unit, or for each leaf; see `quantise`. Static.
      mask: which leaves to round; None: those with two axes or more. Static.

    Returns:
      The rise, a scalar; negative where rounding happens to help.

    Raises:
      ValueError: if `bits` is out of range, the loss is no scalar, not finite outside `jax.jit`, or
        fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def loss_fn(w):
      ...     return jnp.sum((w - jnp.array([[0.9], [0.35], [-1.0]])) ** 2)
      >>> w = jnp.array([[0.9], [0.35], [-1.0]])
      >>> print(f"{measures.quantisation_gap(loss_fn, w, bits=2):.4f}")
      0.1325

    References:
      Watts et al. Sharpness-Aware Pretraining Mitigates Catastrophic Forgetting. arXiv:2605.02105

    Notes:
      Cost: two losses over the data. A flat minimum loses little: to second order the gap is the
      Hessian's quadratic form in the rounding error.
    """
    data = _batches.weigh(batches, weights)
    _check_bits(bits)
    variables = _variables.prepare(loss_fn, params, data, _kernels if mask is None else mask)
    return _batches.run(_Gap(loss_fn, variables, bits, per_channel), params, data)
