"""Parameters that live at a displaced point, so that no extra gradient is needed."""

from typing import Any, NamedTuple

import jax
import optax

from flatopt._core import checks, tree_math
from flatopt._core.tree_math import move


class HoldPerturbedState(NamedTuple):
    """State of `hold_perturbed`.

    Attributes:
      inner_state: state of the wrapped optimiser.
      perturbation_state: state of the perturbation.
      offset: tree like the parameters: parameters minus centre.
    """

    inner_state: optax.OptState
    perturbation_state: optax.OptState
    offset: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the centre, `params - offset`."""
        return move(params, -1.0, tree_math.merge_masked([self.offset], params))


def hold_perturbed(
    optimizer: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the parameters at a displaced point while `optimizer` moves the centre.

    .. math::
      w_t = c_t + \epsilon_t, \qquad c_{t+1} = c_t + u(\nabla L(w_t), c_t), \qquad
      \epsilon_{t+1} = \epsilon(\nabla L(w_t), c_{t+1})

    The training loop takes its one gradient where the parameters are: with random noise as
    perturbation this is training under weight noise, with `scale_to_norm` it is SAM whose ascent
    direction is one step old.

    Args:
      optimizer: any optax transformation; it is shown the centre as `params`.
      perturbation: transformation from a gradient to a displacement; it is given the new centre as
        `params`.

    Returns:
      A wrapper to be outermost. `update` needs `params`. The first step is unperturbed. Evaluate at
      the centre: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.hold_perturbed(optax.sgd(0.1), flatopt.scale_to_norm(0.5))
      >>> params = jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{params:.2f} {flatopt.eval_params(opt_state, params):.2f}")
      1.30 0.80

    Notes:
      Place: outermost; decay or clip inside for the centre, before it for the displaced point.
      Gradient evaluations: none extra. State: one copy of the parameters, the offset, besides the
      inner states. The centre is recovered as `params - offset`, so keep parameters in float32:
      in half precision each step rounds it. A NaN in the gradient enters the offset:
      `optax.apply_if_finite` around the whole skips the step.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> HoldPerturbedState:
        return HoldPerturbedState(
            inner_state=optimizer.init(params),
            perturbation_state=perturbation.init(params),
            offset=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: HoldPerturbedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HoldPerturbedState]:
        checks.require_params("hold_perturbed", params)
        centre = state.eval_params(params)
        inner_updates, inner_state = optimizer.update(
            updates, state.inner_state, centre, **extra_args
        )
        new_centre = optax.apply_updates(centre, inner_updates)
        offset, perturbation_state = perturbation.update(
            updates, state.perturbation_state, new_centre, **extra_args
        )
        offset = optax.tree.cast_like(offset, state.offset)
        moves = jax.tree.map(
            lambda u, new, old: (u + (new - old)).astype(u.dtype),
            inner_updates,
            offset,
            state.offset,
        )
        return moves, HoldPerturbedState(inner_state, perturbation_state, offset)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
