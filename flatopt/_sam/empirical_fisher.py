"""Fisher information for SSAM's masks (Mi et al., arXiv:2210.05177), from single examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import tree_math


def empirical_fisher(
    loss_fn: Callable[..., jax.Array], params: optax.Params, *args: Any
) -> optax.Updates:
    r"""Sum over the examples of their squared gradients, for `mask_by_fisher`.

    .. math:: F = \sum_n (\nabla_w \, L(w, x_n))^2

    Args:
      loss_fn: scalar loss of a batch, called as `loss_fn(params, *args)` with batches of one.
      params: the parameters.
      *args: pytrees of arrays with a common leading axis, that of the examples; at least one.

    Returns:
      A tree like `params`, in float32 at least.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> x = jnp.array([1.0, 2.0])
      >>> print(flatopt.empirical_fisher(lambda w, x: jnp.mean(w * x), jnp.array(1.0), x))
      5.0

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger. arXiv:2210.05177

    Cost: 1 gradient an example, one after the other; 1 copy.
    """
    if not jax.tree.leaves(args):
        raise ValueError("args is empty: pass the batch, whose leading axis numbers the examples.")

    def add(total: Any, example: Any) -> tuple[Any, None]:
        batch = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(loss_fn)(params, *batch)
        return jax.tree.map(lambda t, g: t + tree_math.square(g), total, grads), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, tree_math.scalar_dtype(p)), params)
    return jax.lax.scan(add, zeros, args)[0]
