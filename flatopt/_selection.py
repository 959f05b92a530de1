"""ESAM's data selection: the gradient of the examples that the ascent hurts most."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks


def select_examples(
    clean_losses: jax.Array, perturbed_losses: jax.Array, share: float, strict: bool = False
) -> jax.Array:
    r"""Marks the examples whose loss the ascent raises most: ESAM's data selection.

    .. math:: S = \{ n : \ell_n(w + \epsilon) - \ell_n(w) \text{ among the } k \text{ largest} \}

    Args:
      clean_losses: losses at the clean weights, `[batch]`.
      perturbed_losses: losses at the perturbed ones, `[batch]`.
      share: share of the batch to keep, in (0, 1]; k is that share, rounded down, but at least 1.
        Static.
      strict: True keeps the examples strictly above the k-th largest increase: one fewer, and none
        for k = 1, as the authors' program does. Static.

    Returns:
      Bools, `[batch]`.

    Raises:
      ValueError: if `share` is out of range, or the losses are not one vector each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> clean, perturbed = jnp.zeros(4), jnp.array([0.1, 0.4, 0.3, 0.2])
      >>> print(flatopt.select_examples(clean, perturbed, share=0.5))
      [False  True  True False]

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      Equal increases may keep more than k examples.
    """
    _checks.check_number("share", share, low=0.0, high=1.0)
    if _checks.is_zero(share):
        raise ValueError("share=0 is out of range: it must be in (0, 1].")
    if jnp.ndim(clean_losses) != 1 or jnp.shape(clean_losses) != jnp.shape(perturbed_losses):
        raise ValueError(
            f"clean_losses {jnp.shape(clean_losses)} and perturbed_losses "
            f"{jnp.shape(perturbed_losses)} must be two vectors, one loss an example."
        )
    if share == 1:
        return jnp.ones(jnp.shape(clean_losses), bool)
    increase = perturbed_losses - clean_losses
    number = max(int(share * increase.size), 1)
    threshold = jnp.sort(increase)[-number]
    return increase > threshold if strict else increase >= threshold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectiveGradFn:
    """The gradient of the mean loss of chosen examples; see `make_selective_grad_fn`.

    Attributes:
      losses_fn: loss of each example, called as `losses_fn(params, *args)`.
      args: the batch.
      clean_losses: losses at the clean weights.
      share: share of the batch to keep.
      strict: see `select_examples`.
    """

    losses_fn: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    args: tuple[Any, ...]
    clean_losses: jax.Array
    share: float = dataclasses.field(metadata={"static": True})
    strict: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike = 0, /) -> optax.Updates:
        """Returns the gradient at `params`."""
        del i

        def loss_fn(params: optax.Params) -> jax.Array:
            losses = self.losses_fn(params, *self.args)
            chosen = select_examples(
                self.clean_losses, jax.lax.stop_gradient(losses), self.share, self.strict
            )
            # An example that is not chosen adds nothing, not even a NaN.
            total = jnp.sum(jnp.where(chosen, losses, 0))
            return total / jnp.maximum(jnp.sum(chosen), 1)

        return jax.grad(loss_fn)(params)


def make_selective_grad_fn(
    losses_fn: Callable[..., jax.Array],
    *args: Any,
    clean_losses: jax.Array,
    share: float,
    strict: bool = False,
) -> SelectiveGradFn:
    r"""Makes a `grad_fn` of the examples whose loss the ascent raises most, for `esam`.

    .. math:: \nabla_w \frac{1}{|S|} \sum_{n \in S} \ell_n(w)

    Args:
      losses_fn: loss of each example, called as `losses_fn(params, *args)`; it returns `[batch]`.
      *args: the batch.
      clean_losses: losses at the clean weights, `[batch]`, which the loop's own pass has.
      share: share of the batch to keep, in (0, 1]. Static.
      strict: see `select_examples`. Static.

    Returns:
      A registered pytree that is called as `grad_fn(params, i)`.

    Raises:
      ValueError: if `share` is out of range, or the losses are not one vector each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> def losses_fn(w, x):
      ...     return 0.5 * (w - x) ** 2
      >>> x = jnp.array([-3.0, 1.0])
      >>> clean = losses_fn(0.0, x)
      >>> grad_fn = flatopt.make_selective_grad_fn(losses_fn, x, clean_losses=clean, share=0.5)
      >>> print(grad_fn(jnp.array(0.5), 0))
      3.5

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      Works with any stage that takes a `grad_fn`. One forward pass serves selection and gradient.
    """
    return SelectiveGradFn(losses_fn, args, clean_losses, share, strict)
