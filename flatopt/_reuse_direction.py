"""The stage that takes a sharp gradient now and then and reuses its direction: LookSAM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree
from flatopt._schedules import value_at


class ReuseDirectionState(NamedTuple):
    """State of `reuse_direction`.

    Attributes:
      step: int32 scalar, number of updates so far.
      perturbation_state: state of the perturbation.
      direction: tree like the parameters, the part of the last sharp gradient that was orthogonal
        to the clean one, of length 1; zeros before the first, and where there was none.
    """

    step: jax.Array
    perturbation_state: optax.OptState
    direction: optax.Updates


def reuse_direction(
    perturbation: optax.GradientTransformation,
    every: int,
    alpha: optax.ScalarOrSchedule,
    layerwise: bool = False,
    start: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the gradient at a displaced point once in a while, and reuses what it adds in between.

    With the clean gradient c, a sharp update and the ones after it emit

    .. math::
      p = \nabla L(w + \epsilon(c)), \quad v = p_{\perp c} / \|p_{\perp c}\|
      \qquad \text{and then} \qquad c + \alpha \|c\| v

    Args:
      perturbation: transformation from a gradient to a displacement; it is given the parameters,
        and `step=`, the number of the update.
      every: one sharp update in `every`, >= 1. Static.
      alpha: share of the reused direction, >= 0: a number, a traced array, or a schedule of the
        step count.
      layerwise: whether projection, length and :math:`\|c\|` are those of each leaf, and not of
        the whole tree. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      accumulator_dtype: dtype of the reused direction; None means that of the parameters.
        `jnp.bfloat16` halves the state of parameters in float32. Static.

    Returns:
      A stage to be chained before an optimiser; `update` needs `params` and `grad_fn`. A sharp
      gradient with inf or NaN is handed on, but its direction is not kept.

    Raises:
      ValueError: if an argument is out of range, `params` or `grad_fn` is missing, or the stage
        stands inside `optax.masked`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w[0] ** 2 + 4.0 * w[1] ** 2))
      >>> stage = flatopt.reuse_direction(flatopt.scale_to_norm(0.5), every=2, alpha=0.5)
      >>> w = jnp.array([3.0, 1.0])
      >>> state = stage.init(w)
      >>> for _ in range(2):
      ...     updates, state = stage.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(f"{updates[0]:.2f} {updates[1]:.2f}")
      3.30 5.60
      1.00 5.50

    References:
      Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization.
      arXiv:2203.02714

    Notes:
      With `every=1` it is `gradient_at(perturbation)`. Where the two gradients are parallel to
      rounding, as for a single parameter, there is nothing to be reused: the direction is zero.
      Gradient evaluations: one extra in `every` updates (a real branch). State: one copy of the
      parameters, one integer.
    """
    _checks.check_count("every", every, 1)
    _checks.check_count("start", start, 0)
    _checks.check_number("alpha", alpha, low=0.0)
    perturbation = optax.with_extra_args_support(perturbation)

    def new_direction(clean: Any, sharp: Any) -> Any:
        square = _tree.vdot(clean, clean) + _tree.EPSILON  # Guarded as in the published programs.
        share = _tree.vdot(clean, sharp) / square
        orthogonal = _tree.add_scaled(sharp, -share, clean)
        length = _tree.norm(orthogonal)
        # What rounding and the guard leave of parallel gradients is no direction.
        rounding = max((jnp.finfo(x.dtype).eps for x in jax.tree.leaves(sharp)), default=0.0)
        noise = (8 * rounding + 2 * _tree.EPSILON / square) * _tree.norm(sharp)
        return _tree.scale(jnp.where(length > noise, 1 / length, 0), orthogonal)

    def add_direction(clean: Any, direction: Any, weight: Any) -> Any:
        return _tree.add_scaled(clean, weight * _tree.norm(clean), direction)

    def init_fn(params: optax.Params) -> ReuseDirectionState:
        return ReuseDirectionState(
            step=jnp.zeros([], jnp.int32),
            perturbation_state=perturbation.init(params),
            direction=optax.tree.zeros_like(params, dtype=accumulator_dtype),
        )

    def update_fn(
        updates: optax.Updates,
        state: ReuseDirectionState,
        params: optax.Params | None = None,
        *,
        grad_fn: _checks.GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseDirectionState]:
        _checks.require_params("reuse_direction", params)
        gradient = _checks.require_grad_fn("reuse_direction", grad_fn)
        _checks.require_whole_tree("reuse_direction", params)

        def sharp(carry: Any) -> Any:
            clean, perturbation_state, old = carry
            displacement, perturbation_state = perturbation.update(
                clean, perturbation_state, params, **{**extra_args, "step": state.step}
            )
            grads = gradient(optax.apply_updates(params, displacement), 0)
            grads = optax.tree.cast_like(grads, updates)
            if layerwise:
                direction = jax.tree.map(new_direction, clean, grads)
            else:
                direction = new_direction(clean, grads)
            direction = optax.tree.cast_like(direction, old)
            # Else one overflow would spoil the next updates too.
            finite = jnp.isfinite(_tree.norm(grads))
            direction = optax.tree.where(finite, direction, old)
            return grads, perturbation_state, direction

        carry = (updates, state.perturbation_state, state.direction)
        if every == 1 and start is None:
            grads, perturbation_state, direction = sharp(carry)
        else:
            since_start = state.step - (start or 0)
            due = (since_start >= 0) & (since_start % every == 0)
            grads, perturbation_state, direction = _tree.apply_if(due, sharp, carry)
            weight = jnp.where(due, 0, value_at(alpha, state.step))
            if layerwise:
                grads = jax.tree.map(lambda g, d: add_direction(g, d, weight), grads, direction)
            else:
                grads = add_direction(grads, direction, weight)
        step = optax.safe_increment(state.step)
        return grads, ReuseDirectionState(step, perturbation_state, direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
