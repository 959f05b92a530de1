"""The stage that takes the gradient somewhere else: SAM and its family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._core.timing import Every


class SharpnessState(NamedTuple):
    """What `gradient_at` keeps of its last ascent with `record=True`; zeros before the first.

    Attributes:
      sharpness: rise of the loss on the way up, by the trapezium of its slopes at both ends.
      gradient_cosine: of the angle between the gradients at both ends.
    """

    sharpness: jax.Array
    gradient_cosine: jax.Array


class GradientAtState(NamedTuple):
    """State of `gradient_at`.

    Attributes:
      step: int32 scalar, number of updates so far.
      perturbation_state: state of the perturbation.
      combiner_state: state of the combiner, `optax.EmptyState()` without one.
      recorded: a `SharpnessState` with `record=True`, else `optax.EmptyState()`.
    """

    step: jax.Array
    perturbation_state: optax.OptState
    combiner_state: optax.OptState
    recorded: SharpnessState | optax.EmptyState


def rise_by_trapezium(displacement: Any, clean: Any, perturbed: Any) -> jax.Array:
    r""":math:`\tfrac12 \, \epsilon \cdot (g + g')`, the rise of a loss; exact on a quadratic."""
    rise = tree_math.vdot(displacement, clean) + tree_math.vdot(displacement, perturbed)
    return rise / 2


def sharpness(displacement: Any, clean: Any, perturbed: Any) -> SharpnessState:
    """What the gradients at both ends of an ascent tell of it."""
    rise = rise_by_trapezium(displacement, clean, perturbed)
    return SharpnessState(rise, tree_math.cosine(clean, perturbed))


@registry.method("stage", needs=("grad_fn",))
def gradient_at(
    perturbation: optax.GradientTransformation,
    *,
    num_steps: int | None = None,
    combiner: optax.GradientTransformation | None = None,
    start: int | None = None,
    every: int | None = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the incoming gradient by that at a displaced point; the parameters never move.

    .. math:: w_0 = w, \; g_0 = g, \; w_{i+1} = w_i + \epsilon(g_i), \; g_{i+1} = \nabla L(w_{i+1})

    Args:
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`;
        it is given the parameters before the ascent, and `step=`, the number of the update.
      num_steps: ascent steps n, >= 1, each with a displacement of its own; None is 1. Static.
      combiner: transformation of :math:`g_n`, given the clean one as `clean_updates=`, the point
        as `perturbed_params=`, and `grad_fn=`. Static.
      start: number of updates made when it first acts, >= 0; None is 0. Static.
      every: period from there on, >= 1; None is 1. Other updates pass their gradient on. Static.
      record: keeps "sharpness" and "gradient_cosine" of the ascent for `optax.tree.get`. Static.

    Returns:
      A stage to be chained before an optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.gradient_at(flatopt.scale_to_norm(0.5)), jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
      [3.3 4.4]

    Cost: `num_steps` extra gradients; 0 copies (+1 temporary, +2 with `record`).
    """
    checks.check_count("num_steps", num_steps, 1)
    when = Every.before_update(start, every)
    perturbation = checks.as_transformation("perturbation", perturbation)
    combiner = checks.as_transformation("combiner", combiner or optax.identity())

    def init_fn(params: optax.Params) -> GradientAtState:
        step, flat = jnp.zeros([], jnp.int32), jnp.zeros([], tree_math.scalar_dtype(params))
        kept = SharpnessState(flat, flat) if record else optax.EmptyState()
        return GradientAtState(step, perturbation.init(params), combiner.init(params), kept)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[optax.Updates, GradientAtState]:
        gradient = checks.require_grad_fn("gradient_at", grad_fn, params)
        extra["step"] = state.step

        def climb(i: Any, carry: Any) -> Any:
            point, grads, ascent, way = carry
            displacement, ascent = perturbation.update(grads, ascent, params, **extra)
            point = optax.apply_updates(point, displacement)
            way = tree_math.move(way, 1, displacement) if record else way
            return point, tree_math.cast_like(gradient(point, i), updates), ascent, way

        def sharp(carry: Any) -> Any:
            clean, ascent, mixing, kept = carry
            way = optax.tree.zeros_like(clean) if record else None
            carry = (params, clean, ascent, way)
            point, grads, ascent, way = stage.repeat(num_steps, climb, carry)
            if record:
                kept = tree_math.cast_like(sharpness(way, clean, grads), kept)
            seen = {"clean_updates": clean, "perturbed_params": point, "grad_fn": grad_fn}
            grads, mixing = combiner.update(grads, mixing, params, **(extra | seen))
            return grads, ascent, mixing, kept

        carry = (updates, state.perturbation_state, state.combiner_state, state.recorded)
        grads, *inner = when.run(state.step, sharp, carry)
        return grads, GradientAtState(optax.safe_increment(state.step), *inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ascent_stage(
    rho: optax.ScalarOrSchedule, perturbation: optax.GradientTransformation, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """`gradient_at`; where rho is the number 0, the plain gradient bit for bit and at no cost."""
    return stage.off_when_zero(rho, gradient_at(perturbation, **kwargs))
