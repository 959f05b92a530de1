"""Parameters that live at a displaced point, so that no extra gradient is needed."""

from typing import Any, NamedTuple

import optax

from flatopt._core import checks, registry, tree_math


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
        return tree_math.move(params, -1.0, tree_math.merge_masked([self.offset], params))


def change_offset(update: Any, old: Any, new: Any) -> optax.Updates:
    r"""The centre's update and the offset's, :math:`u + (\epsilon_{t+1} - \epsilon_t)`."""
    wide = tree_math.widened(update, new)
    return tree_math.on_inexact(lambda u, o, n: u + (n - o), wide, old, new)


@registry.method("wrapper")
def hold_perturbed(
    optimizer: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the parameters at a displaced point while `optimizer` moves the centre.

    .. math::
      w_t = c_t + \epsilon_t, \qquad c_{t+1} = c_t + u(\nabla L(w_t), c_t), \qquad
      \epsilon_{t+1} = \epsilon(\nabla L(w_t), c_{t+1})

    Args:
      optimizer: any optax transformation u; it is shown the centre c as `params`.
      perturbation: from a gradient to a displacement; it is shown the new centre as `params`.

    Returns:
      A wrapper to be outermost; `update` needs `params`. The first step is unperturbed. Evaluate at
      the centre: `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.hold_perturbed(optax.sgd(0.1), flatopt.scale_to_norm(0.5))
      >>> params = jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{params:.2f} {flatopt.eval_params(opt_state, params):.2f}")
      1.30 0.80

    Cost: 0 extra gradients; 1 copy (+1 temporary).
    """
    optimizer = checks.as_transformation("optimizer", optimizer)
    perturbation = checks.as_transformation("perturbation", perturbation)

    def init_fn(params: optax.Params) -> HoldPerturbedState:
        offset = optax.tree.zeros_like(params)
        return HoldPerturbedState(optimizer.init(params), perturbation.init(params), offset)

    def update_fn(
        updates: optax.Updates,
        state: HoldPerturbedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HoldPerturbedState]:
        checks.require_params("hold_perturbed", params)
        centre = state.eval_params(params)
        extra_args["perturbed_params"] = params  # Where the gradient was taken.
        moves, inner_state = optimizer.update(updates, state.inner_state, centre, **extra_args)
        centre = optax.apply_updates(centre, moves)
        offset, perturbation_state = perturbation.update(
            updates, state.perturbation_state, centre, **extra_args
        )
        offset = tree_math.cast_like(offset, state.offset)
        moves = change_offset(moves, state.offset, offset)
        return moves, HoldPerturbedState(inner_state, perturbation_state, offset)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
