"""Empirical Fisher information: squared gradients, summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import _tree


def empirical_fisher(
    loss_fn: Callable[..., jax.Array], params: optax.Params, *args: Any
) -> optax.Updates:
    r"""Sum over the examples of their squared gradients, for `mask_by_fisher`.

    .. math:: F = \sum_n (\nabla_w \, L(w, x_n))^2

    Args:
      loss_fn: scalar loss of a batch, called as `loss_fn(params, *args)` with batches of one.
      params: the parameters.
      *args: pytrees of arrays with a common leading axis, that of the examples.

    Returns:
      A tree like `params`, in float32 at least.

    Raises:
      ValueError: if `args` is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> x = jnp.array([1.0, 2.0])
      >>> print(flatopt.empirical_fisher(lambda w, x: jnp.mean(w * x), jnp.array(1.0), x))
      5.0

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      One gradient an example, one after the other (`lax.scan`): memory is that of one.
    """
    if not jax.tree.leaves(args):
        raise ValueError("args is empty: pass the batch, whose leading axis numbers the examples.")

    def add(total: Any, example: Any) -> tuple[Any, None]:
        batch = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(loss_fn)(params, *batch)
        return add_squares(total, grads), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _tree.scalar_dtype(p)), params)
    return jax.lax.scan(add, zeros, args)[0]


def square(x: jax.Array) -> jax.Array:
    """Squared absolute values, in float32 at least."""
    wide = x.astype(_tree.accumulator_dtype(x.dtype))
    return (wide.conj() * wide).real


def add_squares(total: Any, grads: Any) -> Any:
    """`total` and the squares of `grads`, in the dtypes of `total`."""
    return jax.tree.map(lambda t, g: t + square(g).astype(t.dtype), total, grads)
