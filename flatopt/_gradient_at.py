"""The stage that takes the gradient somewhere else: SAM and its family."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree


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


def gradient_at(
    perturbation: optax.GradientTransformation,
    num_steps: int | None = None,
    combiner: optax.GradientTransformation | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the incoming gradient by the gradient at a displaced point.

    .. math::
      w_0 = w, \quad g_0 = g, \quad w_{i+1} = w_i + \epsilon(g_i), \quad g_{i+1} = \nabla L(w_{i+1})

    and emits :math:`g_n` after `num_steps` = n ascent steps, or what `combiner` makes of
    :math:`g_n` and :math:`g`. The parameters never move: the point to come back to is `params`.

    Args:
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`;
        any optax transformation will do. It is given the parameters before the ascent, and
        `step=`, the number of the update.
      num_steps: ascent steps, >= 1, each with a displacement of its own; None means 1. To keep the
        total length within rho, use steps of `rho / num_steps`. Static.
      combiner: transformation applied to the perturbed gradient; it is given the clean one as
        `clean_updates=` and the number of the update as `step=`. None: the perturbed gradient.
        Static.
      start: number of updates that pass their gradient through untouched before the first
        perturbed one, >= 0 (late-phase SAM); None means 0. Static.
      every: perturb one update in `every`, from `start` on, >= 1; None means every one. Static.

    Returns:
      A stage to be chained before an optimiser. Its `update` needs `params` and `grad_fn`; other
      extra arguments are handed to the perturbation and the combiner.

    Raises:
      ValueError: if an argument is out of range, `params` or `grad_fn` is missing, or the stage
        stands inside `optax.masked`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> stage = flatopt.gradient_at(flatopt.scale_to_norm(0.5))
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, _ = stage.update(grad_fn(w), stage.init(w), w, grad_fn=lambda w, i: grad_fn(w))
      >>> print(updates)
      [3.3 4.4]

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Place: what stands before it in the chain changes the ascent gradient, what stands after it
      the descent gradient. So clip and decay after it. Gradient evaluations: `num_steps` extra in a
      perturbed update, none in another (a real branch; under `vmap` over the state it always runs).
      State: two integers; one temporary copy of the parameters.
    """
    _checks.check_count("num_steps", num_steps, 1)
    _checks.check_count("start", start, 0)
    _checks.check_count("every", every, 1)
    perturbation = optax.with_extra_args_support(perturbation)
    combiner = optax.with_extra_args_support(combiner or optax.identity())

    def init_fn(params: optax.Params) -> GradientAtState:
        return GradientAtState(
            step=jnp.zeros([], jnp.int32),
            perturbation_state=perturbation.init(params),
            combiner_state=combiner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: GradientAtState,
        params: optax.Params | None = None,
        *,
        grad_fn: _checks.GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientAtState]:
        _checks.require_params("gradient_at", params)
        gradient = _checks.require_grad_fn("gradient_at", grad_fn)
        _checks.require_whole_tree("gradient_at", params)

        def ascend(i: jax.typing.ArrayLike, carry: Any) -> Any:
            point, grads, perturbation_state = carry
            displacement, perturbation_state = perturbation.update(
                grads, perturbation_state, params, **{**extra_args, "step": state.step}
            )
            point = optax.apply_updates(point, displacement)
            grads = optax.tree.cast_like(gradient(point, i), updates)
            return point, grads, perturbation_state

        def perturbed(carry: Any) -> Any:
            clean, perturbation_state, combiner_state = carry
            carry = (params, clean, perturbation_state)
            if num_steps is None or num_steps == 1:
                carry = ascend(jnp.zeros([], jnp.int32), carry)
            else:  # A loop, not unrolled: the model is traced and compiled once.
                carry = jax.lax.fori_loop(0, num_steps, ascend, carry)
            _, grads, perturbation_state = carry
            grads, combiner_state = combiner.update(
                grads,
                combiner_state,
                params,
                **{**extra_args, "clean_updates": clean, "step": state.step},
            )
            return grads, perturbation_state, combiner_state

        carry = (updates, state.perturbation_state, state.combiner_state)
        if start is None and every is None:
            carry = perturbed(carry)
        else:
            since_start = state.step - (start or 0)
            due = (since_start >= 0) & (since_start % (every or 1) == 0)
            carry = _tree.apply_if(due, perturbed, carry)
        grads, perturbation_state, combiner_state = carry
        step = optax.safe_increment(state.step)
        return grads, GradientAtState(step, perturbation_state, combiner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ascent_stage(
    rho: optax.ScalarOrSchedule, perturbation: optax.GradientTransformation, **kwargs: Any
) -> optax.GradientTransformationExtraArgs:
    """`gradient_at`; where rho is the number 0, the plain gradient bit for bit and at no cost."""
    return off_when_zero(rho, gradient_at(perturbation, **kwargs))


def off_when_zero(
    rho: optax.ScalarOrSchedule, stage: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`stage`; where rho is the number 0, a stage of the same state that does nothing."""
    if not _checks.is_zero(rho):
        return stage
    untouched = optax.with_extra_args_support(optax.identity())
    return optax.GradientTransformationExtraArgs(stage.init, untouched.update)
