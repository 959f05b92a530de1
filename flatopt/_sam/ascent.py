"""Ascent steps: transformations that map a gradient to a displacement, and their directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, stage, tree_math


def finite_norm(tree: Any) -> jax.Array:
    """The norm, or NaN in place of an infinite one.

    Division by that would leave zeros beside the one inf, and a mask may drop that one.
    """
    norm = tree_math.norm(tree)
    return jnp.where(jnp.isfinite(norm), norm, jnp.nan)


def climb_to_norm(grads: Any, rho: Any, epsilon: float = tree_math.EPSILON) -> Any:
    r""":math:`\rho \, g / (\|g\| + \epsilon)`."""
    return tree_math.scale(rho / (finite_norm(grads) + epsilon), grads)


def scale_to_norm(
    rho: optax.ScalarOrSchedule, *, epsilon: float = tree_math.EPSILON
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a displacement of a given length: SAM's ascent step.

    .. math:: \epsilon = \rho \, g / (\|g\| + 10^{-12})

    Args:
      rho: length of the displacement, >= 0, in units of the parameters' Euclidean norm: a number, a
        traced array, or a schedule of the step count (negative values of a schedule count as 0).
      epsilon: what guards the division, > 0; some published programs use 1e-7.

    Returns:
      A perturbation, from gradients to displacements of the same dtypes. A zero gradient gives a
      zero displacement; an inf or NaN in the gradient gives NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation, grads = flatopt.scale_to_norm(0.5), jnp.array([3.0, 4.0])
      >>> print(perturbation.update(grads, perturbation.init(grads))[0])
      [0.3 0.4]

    References:
      Foret et al. Sharpness-Aware Minimization for Efficiently Improving Generalization.
      arXiv:2010.01412

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("epsilon", epsilon, low=0.0, low_allowed=False, schedule_allowed=False)
    return stage.perturbation(lambda g, rho: climb_to_norm(g, rho, epsilon), rho=rho)


def climb_to_adaptive_norm(grads: Any, units: Any, rho: Any) -> Any:
    r""":math:`\rho \, T^2 g / (\|T g\| + 10^{-12})` with T = `units`, a tree of arrays."""
    scaled = tree_math.on_inexact(lambda g, t: t * g, grads, units)
    factor = rho / (finite_norm(scaled) + tree_math.EPSILON)
    return tree_math.on_inexact(lambda g, t: factor * t * g, scaled, units)


def scale_to_adaptive_norm(
    rho: optax.ScalarOrSchedule, eta: optax.ScalarOrSchedule = 0.0, *, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a given length in units of the weights: ASAM's ascent step.

    .. math:: \epsilon = \rho \, T^2 g / (\|T g\| + 10^{-12}), \qquad T = \mathrm{diag}(|w| + \eta)

    Args:
      rho: length of `T^-1 displacement`, >= 0: a number, a traced array, or a schedule.
      eta: added to `|w|`, >= 0, so that weights near zero move too: likewise.
      mask: bools in a tree like the parameters or a prefix of it, or a function from them to one:
        True where `T` applies; elsewhere `T = 1`. None: everywhere. Static.

    Returns:
      A perturbation; needs `params`. Zero gradients give zero; inf or NaN give NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.scale_to_adaptive_norm(0.5)
      >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])
      >>> print(perturbation.update(grads, perturbation.init(params), params)[0])
      [0.3 0.8]

    References:
      Kwon et al. ASAM: Adaptive Sharpness-Aware Minimization. arXiv:2102.11600

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("eta", eta, low=0.0)

    def displace(grads: Any, params: Any, rho: Any, eta: Any) -> Any:
        def unit(adaptive: bool, leaves: Any) -> Any:
            """T, one leaf at a time: in units of the weights where `adaptive`, else 1."""
            real = jax.tree.map(jnp.abs, leaves)
            if not adaptive:
                return jax.tree.map(jnp.ones_like, real)
            return tree_math.on_inexact(lambda size: size + eta, real)

        tree_mask = mask(params) if callable(mask) else (True if mask is None else mask)
        return climb_to_adaptive_norm(grads, jax.tree.map(unit, tree_mask, params), rho)

    return stage.perturbation(displace, needs_params="scale_to_adaptive_norm", rho=rho, eta=eta)


def mask_displacement(mask: Any) -> optax.GradientTransformationExtraArgs:
    r"""Sets a part of the gradient or displacement to zero.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i, \qquad m_i \in \{0, 1\}

    Args:
      mask: bools or 0-1 arrays shaped like the leaves, in a tree like the parameters or a prefix of
        it, or a function from the updates to one. Static, but arrays in it may be traced.

    Returns:
      A transformation that keeps what the mask marks and makes the rest zero, inf and NaN too.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> only_kernel = flatopt.mask_displacement({"kernel": True, "bias": False})
      >>> perturbation = optax.chain(only_kernel, flatopt.scale_to_norm(0.5))
      >>> grads = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([12.0])}
      >>> print(perturbation.update(grads, perturbation.init(grads))[0]["kernel"])
      [0.3 0.4]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Cost: 0 extra gradients; 0 copies.
    """

    def keep(chosen: Any, leaves: Any) -> Any:
        # `where`, not a product: NaN times zero is NaN.
        chosen = jnp.asarray(chosen, bool)
        return jax.tree.map(lambda x: jnp.where(chosen, x, jnp.zeros_like(x)), leaves)

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        return jax.tree.map(keep, mask(updates) if callable(mask) else mask, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class GradientEmaState(NamedTuple):
    """State of a direction that remembers gradients.

    Attributes:
      step: int32 scalar, number of gradients in the average.
      ema: tree like the parameters, their exponential moving average, in float32 or wider
        unless another dtype was asked for.
    """

    step: jax.Array
    ema: optax.Updates


def gradient_ema_direction(
    direction: Callable[[Any, GradientEmaState, Any], tuple[Any, Any]], accumulator_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation around `direction(grads, state, step) -> (direction, new mean)`."""

    def init_fn(params: optax.Params) -> GradientEmaState:
        # Of zeros: the mean of what has none is a copy, here that of a gradient.
        ema = means.zeros(optax.tree.zeros_like(params), accumulator_dtype)
        return GradientEmaState(jnp.zeros([], jnp.int32), ema)

    def update_fn(
        updates: optax.Updates,
        state: GradientEmaState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientEmaState]:
        del params, extra_args
        d, mean = direction(updates, state, state.step if step is None else step)
        new = GradientEmaState(optax.safe_increment(state.step), mean)
        # The stage stands outside `apply_if_finite`, so it must not keep what that will reject. The
        # ascent takes the same norm of d: of the gradient, it would be one more pass over memory.
        finite = jnp.isfinite(tree_math.norm(d))
        if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(mean)):
            finite &= jnp.isfinite(tree_math.norm(mean))  # Its range ends before the gradient's.
        return d, optax.tree.where(finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def follow_mean(c: Any, mean: Any, grads: Any) -> Any:
    r""":math:`(1 - c) \, m + c \, g`, in the dtypes of the mean.

    In terms of c = 1 - decay: a decay within 1e-7 of 1 would be rounded to 1 in float32.
    """
    return tree_math.on_inexact(lambda m, g: (1 - c) * m + c * g, mean, grads)
