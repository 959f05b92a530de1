"""Functional SAM (Singh et al., arXiv:2502.02407): the gradient through the network alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionalGradFn:
    """The gradient through the network alone; see `functional_value_and_grad`.

    Attributes:
      network_fn: the network, called as `network_fn(params, inputs)`.
      inputs: its inputs.
      cotangent: gradient of the loss with respect to the network's outputs, at the clean weights.
    """

    network_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    inputs: Any
    cotangent: Any

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike = 0, /) -> optax.Updates:
        """Returns the product of the Jacobian at `params` and the fixed cotangent."""
        del i
        _, pull_back = jax.vjp(lambda p: self.network_fn(p, self.inputs), params)
        return pull_back(self.cotangent)[0]


def functional_value_and_grad(
    network_fn: Callable[..., Any],
    loss_head: Callable[..., jax.Array],
    params: optax.Params,
    inputs: Any,
    *targets: Any,
) -> tuple[jax.Array, optax.Updates, FunctionalGradFn]:
    r"""The clean pass of functional SAM: loss, gradient, and the `grad_fn` for any SAM stage.

    .. math:: L(w) = \ell(f(w)), \qquad
      \texttt{grad\_fn}(w + \epsilon) = J_f(w + \epsilon)^\top \, \nabla_f \, \ell(f(w))

    Args:
      network_fn: f, called as `network_fn(params, inputs)`; returns the outputs, such as logits.
      loss_head: :math:`\ell`, called as `loss_head(outputs, *targets)`; returns a scalar.
      params, inputs, targets: what the network is called with, and what else the loss needs.

    Returns:
      `(loss, grads, grad_fn)`; the ascent bends the network, and not only its sureness.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> loss_head = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> loss, grads, grad_fn = flatopt.functional_value_and_grad(
      ...     lambda w, x: w * x, loss_head, jnp.array(0.5), jnp.array([1.0, 2.0]), jnp.ones(2))
      >>> print(loss, grads, grad_fn(jnp.array(0.7)))
      0.0625 -0.25 -0.25

    References:
      Singh et al. Avoiding Spurious Sharpness Minimization. arXiv:2502.02407

    Cost: 1 gradient; the gradient of the outputs lives until `grad_fn` is called.
    """
    outputs, pull_back = jax.vjp(lambda p: network_fn(p, inputs), params)
    loss, cotangent = jax.value_and_grad(loss_head)(outputs, *targets)
    return loss, pull_back(cotangent)[0], FunctionalGradFn(network_fn, inputs, cotangent)
