"""ESAM (Du et al., arXiv:2110.03141): random weights ascend, and the hardest examples descend."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core.rng import KeyLike
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


class DropState(NamedTuple):
    """State of `drop_displacement`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      key: uint32 key data.
    """

    step: jax.Array
    key: jax.Array


def drop_displacement(
    keep: float, *, key: rng.KeyLike = 0, per_tensor: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Drops random entries of the displacement and scales up the rest: ESAM's weight perturbation.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i / \beta, \qquad P(m_i = 1) = \beta

    Args:
      keep: :math:`\beta`, in (0, 1]. Static where it is a number.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      per_tensor: True draws once for each leaf, as the authors' code does; False for each weight,
        as in their paper. Static.

    Returns:
      A transformation to be chained after `scale_to_norm`, anew at each displacement.

    Raises:
      ValueError: if `keep` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> drop = flatopt.drop_displacement(keep=0.5, key=0)
      >>> displacement, _ = drop.update(jnp.ones(1000), drop.init(jnp.ones(1000)))
      >>> print(displacement.max(), bool(abs(displacement.mean() - 1) < 0.1))
      2.0 True

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      Gradient evaluations: none of its own; none saved either. State: one key, one integer.
    """
    checks.check_number("keep", keep, low=0.0, high=1.0)
    if checks.is_number(keep, 0):
        raise ValueError("keep=0 is out of range: it must be in (0, 1].")
    data = rng.key_data(key)

    def init_fn(params: optax.Params) -> DropState:
        del params
        return DropState(jnp.zeros([], jnp.int32), jnp.array(data))

    def update_fn(
        updates: optax.Updates,
        state: DropState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DropState]:
        del params, extra_args
        left, use = rng.split(state.key)

        like = jax.tree.map(lambda _: jnp.zeros([]), updates) if per_tensor else updates
        dropped = jax.tree.map(
            lambda x, u: jnp.where(u < keep, x / keep, 0).astype(x.dtype),
            updates,
            rng.uniform_like(use, like),
        )
        return dropped, DropState(optax.safe_increment(state.step), left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def select_examples(
    clean_losses: jax.Array, perturbed_losses: jax.Array, share: float, *, strict: bool = False
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
    checks.check_number("share", share, low=0.0, high=1.0)
    if checks.is_number(share, 0):
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
                self.clean_losses, jax.lax.stop_gradient(losses), self.share, strict=self.strict
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


def esam(
    rho: optax.ScalarOrSchedule,
    *,
    beta: float = 1.0,
    key: KeyLike = 0,
    per_tensor: bool = False,
    epsilon: float = tree_math.EPSILON,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ESAM: the ascent moves random weights, and the second gradient is of the hardest examples.

    .. math::
      g \leftarrow \nabla L_S(w + m \circ \rho \, g / (\beta \|g\|)), \qquad P(m_i = 1) = \beta

    where S are the examples whose loss the ascent raises most. `make_selective_grad_fn` makes the
    `grad_fn` that selects them; with that of `make_grad_fn`, S is the whole batch.

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      beta: share of the weights that move, in (0, 1]; see `drop_displacement`.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      per_tensor: whether whole leaves are drawn, not single weights. Static.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> def losses_fn(w, x):
      ...     return 0.5 * (w - x) ** 2
      >>> tx = optax.chain(flatopt.esam(rho=0.5), optax.sgd(0.1))
      >>> params, x = jnp.array(0.0), jnp.array([-3.0, 1.0])
      >>> losses = losses_fn(params, x)
      >>> grads = flatopt.make_grad_fn(lambda w, x: losses_fn(w, x).mean(), x)(params)
      >>> grad_fn = flatopt.make_selective_grad_fn(losses_fn, x, clean_losses=losses, share=0.5)
      >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      -0.35

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      With a fixed batch shape the selection saves nothing: the gradient of the others is multiplied
      by zero. Place: as for `sam`. Gradient evaluations: one extra per sharp update, and one
      forward pass if examples are selected. State: one key, three integers; one temporary copy of
      the parameters.
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation: optax.GradientTransformation = scale_to_norm(rho, epsilon=epsilon)
    if not (isinstance(beta, int | float) and beta == 1):
        perturbation = optax.chain(
            perturbation, drop_displacement(beta, key=key, per_tensor=per_tensor)
        )
    return ascent_stage(rho, perturbation, start=start, every=every)
