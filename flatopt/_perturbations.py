"""Perturbations: transformations that map a gradient to a displacement of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree
from flatopt._schedules import value_at


class PerturbationState(NamedTuple):
    """State of a perturbation whose radius may follow a schedule.

    Attributes:
      step: int32 scalar, number of displacements made so far.
    """

    step: jax.Array


def scale_to_norm(
    rho: optax.ScalarOrSchedule, epsilon: float = _tree.EPSILON
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a displacement of a given length: SAM's ascent step.

    .. math:: \epsilon = \rho \, g / (\|g\| + 10^{-12})

    The norm is global over the tree and accumulated in float32 at least.

    Args:
      rho: length of the displacement, >= 0, in units of the parameters' Euclidean norm: a number, a
        traced array, or a schedule of the step count (negative values of a schedule count as 0).
      epsilon: what guards the division, > 0; some published programs use 1e-7.

    Returns:
      A transformation from gradients to displacements of the same dtypes. A zero gradient gives a
      zero displacement; an inf or NaN in the gradient gives NaN.

    Raises:
      ValueError: if `rho` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.scale_to_norm(0.5)
      >>> grads = jnp.array([3.0, 4.0])
      >>> displacement, _ = perturbation.update(grads, perturbation.init(grads))
      >>> print(displacement)
      [0.3 0.4]

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Place: inside `gradient_at`, `hold_perturbed`. Gradient evaluations: none of its own. State:
      one integer. A schedule counts the optimiser's steps when a stage such as `gradient_at` passes
      `step=`, the number of the step; on its own it counts its own calls.
    """
    _checks.check_number("rho", rho, low=0.0)

    def update_fn(
        updates: optax.Updates,
        state: PerturbationState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbationState]:
        del params, extra_args
        radius = _radius(rho, state.step if step is None else step)
        displacement = _tree.scale(radius / (_tree.norm(updates) + epsilon), updates)
        return displacement, PerturbationState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def scale_to_adaptive_norm(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a given length in units of the weights: ASAM's ascent step.

    .. math::
      T = \mathrm{diag}(|w| + \eta), \qquad \epsilon = \rho \, T^2 g / (\|T g\| + 10^{-12})

    Rescaling a weight rescales its displacement, so that the step does not depend on the scale of
    the weights.

    Args:
      rho: length of `T^-1 displacement`, >= 0: a number, a traced array, or a schedule of the step
        count (negative values of a schedule count as 0).
      eta: added to `|w|`, >= 0, so that weights near zero move too: likewise.
      mask: pytree of bools with the structure of the parameters or a prefix of it, or a function
        from the parameters to one: True where `T` applies; elsewhere `T = 1`. None: everywhere.
        Static.

    Returns:
      A transformation from gradients to displacements of the same dtypes; `update` needs `params`.
      Zero gradients give zero; inf or NaN give NaN.

    Raises:
      ValueError: if `rho` or `eta` is negative or not finite, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.scale_to_adaptive_norm(0.5)
      >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])
      >>> displacement, _ = perturbation.update(grads, perturbation.init(params), params)
      >>> print(displacement)
      [0.3 0.8]

    References:
      Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks. arXiv:2102.11600

    Notes:
      Two programs under one name: `eta=0` on every leaf is `adaptive=True` of the widespread
      PyTorch SAM; the ASAM authors' own code uses `eta=0.01` and `T = 1` for leaves that are not
      called "weight" (`mask`). Gradient evaluations: none of its own. State: one integer.
    """
    _checks.check_number("rho", rho, low=0.0)
    _checks.check_number("eta", eta, low=0.0)

    def update_fn(
        updates: optax.Updates,
        state: PerturbationState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbationState]:
        del extra_args
        _checks.require_params("scale_to_adaptive_norm", params)
        step = state.step if step is None else step
        offset = value_at(eta, step)
        tree_mask = mask(params) if callable(mask) else (True if mask is None else mask)

        def unit(adaptive: bool, leaves: Any) -> Any:
            """T, one leaf at a time: in units of the weights where `adaptive`, else 1."""
            if not adaptive:
                return jax.tree.map(lambda w: jnp.ones_like(w, w.real.dtype), leaves)
            return jax.tree.map(lambda w: (jnp.abs(w) + offset).astype(w.real.dtype), leaves)

        units = jax.tree.map(unit, tree_mask, params)
        scaled = jax.tree.map(lambda t, g: (t * g).astype(g.dtype), units, updates)
        factor = _radius(rho, step) / (_tree.norm(scaled) + _tree.EPSILON)
        displacement = jax.tree.map(lambda t, g: (factor * t * g).astype(g.dtype), units, scaled)
        return displacement, PerturbationState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def scale_to_layer_norms(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf of the gradient to a share of the norm of its weights.

    .. math:: \epsilon_l = \rho \, \|w_l\| \, g_l / (\|g_l\| + 10^{-12})

    Args:
      rho: length of each leaf's displacement over the norm of its weights, >= 0: a number, a traced
        array, or a schedule of the step count (negative values of a schedule count as 0).

    Returns:
      A transformation from gradients to displacements of the same dtypes; `update` needs `params`.
      Zero gradients and leaves whose weights are zero give zero; inf or NaN give NaN.

    Raises:
      ValueError: if `rho` is negative or not finite, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.scale_to_layer_norms(0.1)
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}
      >>> grads = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([-7.0])}
      >>> displacement, _ = perturbation.update(grads, perturbation.init(params), params)
      >>> print(displacement["a"], displacement["b"])
      [0.  0.5] [-0.2]

    References:
      Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization.
      arXiv:2203.02714

    Notes:
      Like the trust ratio of LARS and LAMB, but a leaf of zero weights does not move. Gradient
      evaluations: none of its own. State: one integer.
    """
    _checks.check_number("rho", rho, low=0.0)

    def update_fn(
        updates: optax.Updates,
        state: PerturbationState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbationState]:
        del extra_args
        _checks.require_params("scale_to_layer_norms", params)
        radius = _radius(rho, state.step if step is None else step)

        def leaf(g: jax.Array, w: jax.Array) -> jax.Array:
            return _tree.scale(radius * _tree.norm(w) / (_tree.norm(g) + _tree.EPSILON), g)

        displacement = jax.tree.map(leaf, updates, params)
        return displacement, PerturbationState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def scale_to_loss_rise(
    budget: optax.ScalarOrSchedule, max_rho: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to the displacement that raises the linearised loss by a given amount.

    .. math:: \epsilon = \min(\sigma / \|g\|, \rho_{max}) \, g / \|g\|

    Args:
      budget: :math:`\sigma`, the rise of the loss, >= 0, in units of the loss: a number, a traced
        array, or a schedule of the step count (negative values of a schedule count as 0).
      max_rho: the longest displacement, >= 0: likewise.

    Returns:
      A transformation from gradients to displacements of the same dtypes. A zero gradient gives a
      zero displacement; an inf or NaN in the gradient gives NaN.

    Raises:
      ValueError: if `budget` or `max_rho` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.scale_to_loss_rise(budget=1.0, max_rho=0.5)
      >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])):
      ...     print(perturbation.update(grads, perturbation.init(grads))[0])
      [0.12 0.16]
      [0.3 0.4]

    References:
      Wang, Liu, Xie, Gao. Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
      Sharpness-Aware Minimization. arXiv:2605.10183

    Notes:
      Gradient evaluations: none of its own. State: one integer.
    """
    _checks.check_number("budget", budget, low=0.0)
    _checks.check_number("max_rho", max_rho, low=0.0)

    def update_fn(
        updates: optax.Updates,
        state: PerturbationState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbationState]:
        del params, extra_args
        step = state.step if step is None else step
        norm = _tree.norm(updates) + _tree.EPSILON
        radius = jnp.minimum(_radius(budget, step) / norm, _radius(max_rho, step))
        displacement = _tree.scale(radius / norm, updates)
        return displacement, PerturbationState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(_init, update_fn)


def mask_displacement(mask: Any) -> optax.GradientTransformationExtraArgs:
    r"""Sets a part of the gradient or displacement to zero.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i, \qquad m_i \in \{0, 1\}

    Args:
      mask: pytree of bools or of 0-1 arrays shaped like the leaves, with the structure of the
        parameters or a prefix of it, or a function from the updates to one. Static, but arrays in
        it may be traced.

    Returns:
      A transformation that keeps what the mask marks, and makes the rest exactly zero, inf and NaN
      included.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> mask = {"kernel": True, "bias": False}
      >>> grads = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([12.0])}
      >>> before = optax.chain(flatopt.mask_displacement(mask), flatopt.scale_to_norm(0.5))
      >>> after = optax.chain(flatopt.scale_to_norm(0.5), flatopt.mask_displacement(mask))
      >>> for perturbation in (before, after):
      ...     displacement, _ = perturbation.update(grads, perturbation.init(grads))
      ...     print(displacement["kernel"], displacement["bias"])
      [0.3 0.4] [0.]
      [0.115 0.153] [0.]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      Before `scale_to_norm`, the chosen leaves get the whole length rho; after it, the norm is that
      of the full gradient and the displacement is shorter, as in sparse SAM. `optax.masked` is not
      a substitute: it hands the leaves it does not mark through unchanged. Gradient evaluations:
      none of its own. State: none.
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        tree_mask = mask(updates) if callable(mask) else mask

        def keep(chosen: Any, leaves: Any) -> Any:
            # `where`, not a product: NaN times zero is NaN.
            chosen = jnp.asarray(chosen, bool)
            return jax.tree.map(lambda x: jnp.where(chosen, x, jnp.zeros_like(x)), leaves)

        return jax.tree.map(keep, tree_mask, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _init(params: optax.Params) -> PerturbationState:
    del params
    return PerturbationState(step=jnp.zeros([], jnp.int32))


def _radius(rho: optax.ScalarOrSchedule, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The value of `rho` at `step`; a schedule that dips below zero gives zero."""
    return jnp.maximum(rho(step), 0.0) if callable(rho) else rho
