"""Functional SAM: the gradient through the network alone."""

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

    With :math:`L(w) = \ell(f(w))`, a stage that calls this `grad_fn` at :math:`w + \epsilon` gets

    .. math:: J_f(w + \epsilon)^\top \, \nabla_f \, \ell(f(w))

    so that the ascent bends the network but does not merely make its outputs less sure.

    Args:
      network_fn: f, called as `network_fn(params, inputs)`; returns the outputs, such as logits.
      loss_head: :math:`\ell`, called as `loss_head(outputs, *targets)`; returns a scalar.
      params: the parameters.
      inputs: inputs of the network.
      *targets: what the loss needs besides the outputs.

    Returns:
      `(loss, grads, grad_fn)`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> def network_fn(w, x):
      ...     return jnp.tanh(w * x)
      >>> def loss_head(outputs, y):
      ...     return 0.5 * jnp.mean((outputs - y) ** 2)
      >>> params, x, y = jnp.array(0.5), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
      >>> tx = optax.chain(flatopt.sam(rho=0.1), optax.sgd(0.1))
      >>> loss, grads, grad_fn = flatopt.functional_value_and_grad(
      ...     network_fn, loss_head, params, x, y
      ... )
      >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(f"{loss:.4f} {grads:.4f} {updates:.4f}")
      0.0865 -0.3116 0.0363

    References:
      Singh, Mobahi, Agarwala, Dauphin. Avoiding Spurious Sharpness Minimization Broadens
      Applicability of SAM. arXiv:2502.02407

    Notes:
      Gradient evaluations: as for the stage. Memory: the cotangent, of the size of the outputs,
      lives until the second gradient: for a language model, one more array of logits.
    """
    outputs, pull_back = jax.vjp(lambda p: network_fn(p, inputs), params)
    loss, cotangent = jax.value_and_grad(loss_head)(outputs, *targets)
    return loss, pull_back(cotangent)[0], FunctionalGradFn(network_fn, inputs, cotangent)
