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
      per_channel: one step for each index of the last axis (a kernel's output), or for each leaf.
        Static.
      mask: as in `hessian_vector_product`; None: leaves with two axes or more, as is usual. Static.

    Returns:
      A tree like `params`, in the same dtypes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.quantise(jnp.array([[0.9], [0.35], [-1.0]]), bits=2).ravel())
      [ 1.  0. -1.]

    References:
      Jacob et al. Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference. arXiv:1712.05877

    Cost: nothing.
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
    """The rise of the loss when the weights are rounded to few bits.

    .. math:: L(q(w)) - L(w)

    Args:
      loss_fn, params, batches, weights: a loss or an error; see `hessian_vector_product`.
      bits, per_channel, mask: the grid, and the leaves to round; see `quantise`. Static.

    Returns:
      The rise, a scalar; negative where rounding happens to help.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> w = jnp.array([[0.9], [0.35], [-1.0]])
      >>> gap = measures.quantisation_gap(lambda v: jnp.sum((v - w) ** 2), w, bits=2)
      >>> print(f"{gap:.4f}")
      0.1325

    References:
      Watts et al. Sharpness-Aware Pretraining Mitigates Catastrophic Forgetting. arXiv:2605.02105

    Cost: two losses over the data.
    """
    data = _batches.weigh(batches, weights)
    _check_bits(bits)
    variables = _variables.prepare(loss_fn, params, data, _kernels if mask is None else mask)
    return _batches.run(_Gap(loss_fn, variables, bits, per_channel), params, data)
