"""ESAM (Du et al., arXiv:2110.03141): random weights ascend, and the hardest examples descend."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


def drop(x: jax.Array, u: jax.Array, beta: Any) -> jax.Array:
    r""":math:`m x / \beta` with m = 1 where the uniform draw u is below :math:`\beta`, else 0."""
    # A product, not a zero: what is dropped must not hide inf and NaN.
    return jnp.where(u < beta, x / beta, 0 * x)


class DropState(NamedTuple):
    """State of `drop_displacement`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      key: uint32 key data.
    """

    step: jax.Array
    key: jax.Array


def drop_displacement(
    keep: jax.typing.ArrayLike, *, key: rng.KeyLike = 0, per_tensor: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Drops random entries of the displacement and scales up the rest: ESAM's weight perturbation.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i / \beta, \qquad P(m_i = 1) = \beta

    Args:
      keep: :math:`\beta`, in (0, 1]: a number or a traced array.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      per_tensor: True draws once for each leaf, as the authors' program does; False for each
        weight, as in their paper. Static.

    Returns:
      A transformation to be chained after `scale_to_norm`, anew at each displacement.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, ones = flatopt.drop_displacement(keep=0.5), jnp.ones(1000)
      >>> displacement, _ = stage.update(ones, stage.init(ones))
      >>> print(displacement.max(), bool(abs(displacement.mean() - 1) < 0.1))
      2.0 True

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    _check_share("keep", keep)
    stream = rng.Stream(key)

    def init_fn(params: optax.Params) -> DropState:
        del params
        return DropState(jnp.zeros([], jnp.int32), stream.init())

    def update_fn(
        updates: optax.Updates, state: DropState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, DropState]:
        del params, extra_args
        left, use = stream.split(state.key)
        like = jax.tree.map(lambda _: jnp.zeros([]), updates) if per_tensor else updates
        draws = rng.uniform_like(use, like)
        dropped = tree_math.on_inexact(lambda x, u: drop(x, u, keep), updates, draws)
        return dropped, DropState(optax.safe_increment(state.step), left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def select_examples(
    clean_losses: jax.Array, perturbed_losses: jax.Array, share: float, *, strict: bool = False
) -> jax.Array:
    r"""Marks the examples whose loss the ascent raises most: ESAM's data selection.

    .. math:: S = \{ n : \ell_n(w + \epsilon) - \ell_n(w) \text{ among the } k \text{ largest} \}

    Args:
      clean_losses, perturbed_losses: losses at the clean weights and at the perturbed, `[batch]`.
        Where they differ by NaN, the example is among the largest, so that NaN is not hidden.
      share: share of the batch to keep, in (0, 1]; k is that, rounded down, but at least 1. Static.
      strict: True keeps what is strictly above the k-th largest increase: one fewer, and none for
        k = 1, as the authors' program does. Static.

    Returns:
      Bools, `[batch]`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> clean, perturbed = jnp.zeros(4), jnp.array([0.1, 0.4, 0.3, 0.2])
      >>> print(flatopt.select_examples(clean, perturbed, share=0.5))
      [False  True  True False]

    References:
      Du et al. Efficient Sharpness-aware Minimization. arXiv:2110.03141

    Cost: 0 gradients.
    """
    _check_share("share", share)
    if jnp.ndim(clean_losses) != 1 or jnp.shape(clean_losses) != jnp.shape(perturbed_losses):
        raise ValueError(
            f"clean_losses {jnp.shape(clean_losses)} and perturbed_losses "
            f"{jnp.shape(perturbed_losses)} must be two vectors, one loss an example."
        )
    if share == 1:
        return jnp.ones(jnp.shape(clean_losses), bool)
    increase = perturbed_losses - clean_losses
    increase = jnp.where(jnp.isnan(increase), jnp.inf, increase)
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
      clean_losses, share, strict: see `select_examples`; the loop's own pass has the clean losses.

    Returns:
      A registered pytree that is called as `grad_fn(params, i)`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> losses_fn, x = lambda w, x: 0.5 * (w - x) ** 2, jnp.array([-3.0, 1.0])
      >>> clean = losses_fn(0.0, x)
      >>> grad_fn = flatopt.make_selective_grad_fn(losses_fn, x, clean_losses=clean, share=0.5)
      >>> print(grad_fn(jnp.array(0.5), 0))
      3.5

    References:
      Du et al. Efficient Sharpness-aware Minimization. arXiv:2110.03141

    Cost: 1 gradient a call, of the whole batch: the others are multiplied by zero.
    """
    return SelectiveGradFn(losses_fn, args, clean_losses, share, strict)


@registry.method("stage", needs=("grad_fn",))
def esam(
    rho: optax.ScalarOrSchedule,
    *,
    beta: jax.typing.ArrayLike = 1.0,
    key: rng.KeyLike = 0,
    per_tensor: bool = False,
    epsilon: float = tree_math.EPSILON,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ESAM: the ascent moves random weights, and the second gradient is of the hardest examples.

    .. math:: g \leftarrow \nabla L_S(w + m \circ \rho g / (\beta \|g\|)), P(m_i = 1) = \beta

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      beta: share of the weights that move, in (0, 1]: a number or a traced array.
      key, per_tensor: see `drop_displacement`.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`: S is the
      whole batch with that of `make_grad_fn`, a part with that of `make_selective_grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.esam(rho=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.3 4.4]

    References:
      Du et al. Efficient Sharpness-aware Minimization. arXiv:2110.03141

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    _check_share("beta", beta)
    perturbation: optax.GradientTransformation = scale_to_norm(rho, epsilon=epsilon)
    # A Python number: injected, 1 is an array, whose state must not depend on its value.
    if not (isinstance(beta, int | float) and beta == 1):
        mask = drop_displacement(beta, key=key, per_tensor=per_tensor)
        perturbation = optax.chain(perturbation, mask)
    return ascent_stage(rho, perturbation, start=start, every=every)


def _check_share(name: str, share: Any) -> None:
    checks.check_number(name, share, low=0.0, high=1.0, low_allowed=False, schedule_allowed=False)
