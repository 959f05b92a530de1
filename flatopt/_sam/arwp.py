"""ARWP (Li et al., arXiv:2404.00357): the gradient is taken at a randomly displaced point only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._core.timing import nonnegative_at, value_at
from flatopt._sam.noise import filter_norms, filter_squares, standard_normal


def damp(z: Any, w: Any, fisher: Any, sigma: Any, eta: Any, filter_axis: int | None) -> Any:
    r""":math:`\sigma \, \|w_f\| \, z_f / \sqrt{1 + \eta F_f}` for each filter f."""

    def leaf(z: jax.Array, w: jax.Array, f: jax.Array) -> jax.Array:
        return sigma * filter_norms(w, filter_axis) / jnp.sqrt(1 + eta * f) * z

    return tree_math.on_inexact(leaf, z, w, fisher)


def accumulate(fisher: Any, grads: Any, beta: Any, filter_axis: int | None) -> Any:
    r""":math:`\beta F_f + \|g_f\|^2`; a gradient whose squares are not finite does not enter."""

    def leaf(f: jax.Array, g: jax.Array) -> jax.Array:
        return (beta * f + filter_squares(g, filter_axis)).astype(f.dtype)

    # The sum never forgets an inf, so it must not keep what `apply_if_finite` may reject later.
    new = jax.tree.map(leaf, fisher, grads)
    return optax.tree.where(jnp.isfinite(tree_math.norm(new)), new, fisher)


class AdaptiveFilterNoiseState(NamedTuple):
    """State of `adaptive_filter_noise` and `arwp`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      noise_state: state of what draws the noise.
      fisher: tree like the parameters, one float for each filter: the decayed sum of its squared
        gradients. A leaf with less than two axes has one for each entry.
    """

    step: jax.Array
    noise_state: optax.OptState
    fisher: Any


def adaptive_filter_noise(
    std: optax.ScalarOrSchedule,
    *,
    eta: optax.ScalarOrSchedule = 0.1,
    decay: optax.ScalarOrSchedule = 0.99,
    key: rng.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`filter_noise` that is smaller where gradients have been large.

    .. math:: \epsilon_f = \sigma \, \|w_f\| \, z_f / \sqrt{1 + \eta F_f}, \quad
      F_f \leftarrow \beta F_f + \|g_f\|^2

    Args:
      std, key, filter_axis, noise: see `filter_noise`.
      eta: how strongly large gradients damp the noise, >= 0: a number, a traced array, a schedule.
      decay: :math:`\beta`, in [0, 1): likewise; no factor :math:`1 - \beta`, as in the program.

    Returns:
      A perturbation; needs `params`. Its gradient enters F before the displacement is made; one
      whose squares are not finite does not.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation, w = flatopt.adaptive_filter_noise(std=0.01), jnp.ones((2, 3))
      >>> print(perturbation.update(w, perturbation.init(w), w)[1].fisher)
      [[2. 2. 2.]]

    References:
      Li et al. Revisiting Random Weight Perturbation. arXiv:2404.00357

    Cost: 0 extra gradients; 0 copies (+1 temporary); one float a filter.
    """
    noise = _check(std, eta, decay, noise, key)

    def update_fn(
        updates: Any,
        state: AdaptiveFilterNoiseState,
        params: Any = None,
        *,
        step: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        checks.require_params("adaptive_filter_noise", params)
        step = state.step if step is None else step
        fisher = accumulate(state.fisher, updates, value_at(decay, step), filter_axis)
        draws, noise_state = noise.update(updates, state.noise_state, params, **extra_args)
        sigma, now_eta = nonnegative_at(std, step), value_at(eta, step)
        displacement = damp(draws, params, fisher, sigma, now_eta, filter_axis)
        number = optax.safe_increment(state.step)
        return displacement, AdaptiveFilterNoiseState(number, noise_state, fisher)

    return optax.GradientTransformationExtraArgs(_init(noise, filter_axis), update_fn)


@registry.method("stage", needs=("grad_fn",))
def arwp(
    std: optax.ScalarOrSchedule,
    *,
    eta: optax.ScalarOrSchedule = 0.1,
    decay: optax.ScalarOrSchedule = 0.99,
    key: rng.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive random weight perturbation: descend with the gradient at a noisy point alone.

    .. math:: g = \nabla L(w + \epsilon), \quad
      \epsilon_f = \sigma \, \|w_f\| \, z_f / \sqrt{1 + \eta F_f}, \quad
      F_f \leftarrow \beta F_f + \|g_f\|^2

    Args:
      std: see `filter_noise`; with the number 0 the stage is the identity.
      eta, decay: see `adaptive_filter_noise`.
      key, filter_axis, noise: see `filter_noise`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`. The
      gradient it is given is not used: under `jit` it is not even computed.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.arwp(std=0.01), jnp.ones((2, 3))
      >>> print(jnp.round(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0][0], 1))
      [1. 1. 1.]

    References:
      Li et al. Revisiting Random Weight Perturbation. arXiv:2404.00357

    Cost: 1 extra gradient, and none by the loop; 0 copies (+1 temporary); one float a filter.
    """
    noise = _check(std, eta, decay, noise, key)

    def update_fn(
        updates: Any,
        state: AdaptiveFilterNoiseState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        if checks.is_number(std, 0):
            return updates, state
        gradient, step = checks.require_grad_fn("arwp", grad_fn, params), state.step
        draws, noise_state = noise.update(updates, state.noise_state, params, **extra_args)
        sigma, now_eta = nonnegative_at(std, step), value_at(eta, step)
        displacement = damp(draws, params, state.fisher, sigma, now_eta, filter_axis)
        grads = gradient(optax.apply_updates(params, displacement), 0)
        grads = tree_math.cast_like(grads, updates)
        fisher = accumulate(state.fisher, grads, value_at(decay, step), filter_axis)
        return grads, AdaptiveFilterNoiseState(optax.safe_increment(step), noise_state, fisher)

    return optax.GradientTransformationExtraArgs(_init(noise, filter_axis), update_fn)


def _check(std: Any, eta: Any, decay: Any, noise: Any, key: rng.KeyLike) -> Any:
    """The transformation that draws z; raises where an argument is out of range."""
    checks.check_number("std", std, low=0.0)
    checks.check_number("eta", eta, low=0.0)
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
    return checks.as_transformation("noise", standard_normal(key) if noise is None else noise)


def _init(noise: Any, filter_axis: int | None) -> Any:
    def init_fn(params: optax.Params) -> AdaptiveFilterNoiseState:
        fisher = jax.tree.map(lambda p: jnp.zeros_like(filter_squares(p, filter_axis)), params)
        return AdaptiveFilterNoiseState(jnp.zeros([], jnp.int32), noise.init(params), fisher)

    return init_fn
