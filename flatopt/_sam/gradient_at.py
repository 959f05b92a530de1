"""The stage that takes the gradient somewhere else: SAM and its family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import Every


class GradientAtState(NamedTuple):
    """State of `gradient_at`.

    Attributes:
      step: int32 scalar, number of updates so far.
      perturbation_state: state of the perturbation.
      combiner_state: state of the combiner, `optax.EmptyState()` without one.
    """

    step: jax.Array
    perturbation_state: optax.OptState
    combiner_state: optax.OptState


@registry.method("stage", needs=("grad_fn",))
def gradient_at(
    perturbation: optax.GradientTransformation,
    *,
    num_steps: int | None = None,
    combiner: optax.GradientTransformation | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the incoming gradient by that at a displaced point; the parameters never move.

    .. math:: w_0 = w, \; g_0 = g, \; w_{i+1} = w_i + \epsilon(g_i), \; g_{i+1} = \nabla L(w_{i+1})

    Args:
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`;
        it is given the parameters before the ascent, and `step=`, the number of the update.
      num_steps: ascent steps n, >= 1, each with a displacement of its own; None is 1. Static.
      combiner: transformation of :math:`g_n`, given also the clean one as `clean_updates=`. Static.
      start: number of updates made when it first acts, >= 0; None is 0. Static.
      every: period from there on, >= 1; None is 1. Other updates pass their gradient on. Static.

    Returns:
      A stage to be chained before an optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.gradient_at(flatopt.scale_to_norm(0.5)), jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
      [3.3 4.4]

    Cost: `num_steps` extra gradients; 0 copies (+1 temporary).
    """
    checks.check_count("num_steps", num_steps, 1)
    when = Every.before_update(start, every)
    perturbation = checks.as_transformation("perturbation", perturbation)
    combiner = checks.as_transformation("combiner", combiner or optax.identity())

    def init_fn(params: optax.Params) -> GradientAtState:
        step = jnp.zeros([], jnp.int32)
        return GradientAtState(step, perturbation.init(params), combiner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: GradientAtState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientAtState]:
        gradient = checks.require_grad_fn("gradient_at", grad_fn, params)
        extra_args["step"] = state.step

        def climb(i: Any, carry: Any) -> Any:
            point, grads, ascent = carry
            displacement, ascent = perturbation.update(grads, ascent, params, **extra_args)
            point = optax.apply_updates(point, displacement)
            return point, tree_math.cast_like(gradient(point, i), updates), ascent

        def sharp(carry: Any) -> Any:
            clean, ascent, mixing = carry
            _, grads, ascent = stage.repeat(num_steps, climb, (params, clean, ascent))
            grads, mixing = combiner.update(
                grads, mixing, params, clean_updates=clean, **extra_args
            )
            return grads, ascent, mixing

        carry = (updates, state.perturbation_state, state.combiner_state)
        grads, *inner = when.run(state.step, sharp, carry)
        return grads, GradientAtState(optax.safe_increment(state.step), *inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ascent_stage(
    rho: optax.ScalarOrSchedule, perturbation: optax.GradientTransformation, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """`gradient_at`; where rho is the number 0, the plain gradient bit for bit and at no cost."""
    return stage.off_when_zero(rho, gradient_at(perturbation, **kwargs))
