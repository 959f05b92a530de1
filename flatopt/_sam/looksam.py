"""LookSAM (Liu et al., arXiv:2203.02714): a sharp gradient now and then, reused in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, stage, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import Every, value_at
from flatopt._sam.ascent import scale_to_norm


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
    checks.check_number("rho", rho, low=0.0)

    def displace(grads: Any, params: Any, rho: Any) -> Any:
        def leaf(g: jax.Array, w: jax.Array) -> jax.Array:
            length = rho * tree_math.norm(w)
            return tree_math.scale(length / (tree_math.norm(g) + tree_math.EPSILON), g)

        return jax.tree.map(leaf, grads, params)

    return stage.perturbation(displace, needs_params="scale_to_layer_norms", rho=rho)


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
    *,
    every: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
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
    when = Every.before_update(start, every)
    checks.check_number("alpha", alpha, low=0.0)
    perturbation = optax.with_extra_args_support(perturbation)

    def new_direction(clean: Any, sharp: Any) -> Any:
        square = (
            tree_math.vdot(clean, clean) + tree_math.EPSILON
        )  # Guarded as in the published programs.
        share = tree_math.vdot(clean, sharp) / square
        orthogonal = tree_math.add_scaled(sharp, -share, clean)
        length = tree_math.norm(orthogonal)
        # What rounding and the guard leave of parallel gradients is no direction.
        rounding = max((jnp.finfo(x.dtype).eps for x in jax.tree.leaves(sharp)), default=0.0)
        noise = (8 * rounding + 2 * tree_math.EPSILON / square) * tree_math.norm(sharp)
        return tree_math.scale(jnp.where(length > noise, 1 / length, 0), orthogonal)

    def add_direction(clean: Any, direction: Any, weight: Any) -> Any:
        return tree_math.add_scaled(clean, weight * tree_math.norm(clean), direction)

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
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseDirectionState]:
        gradient = checks.require_grad_fn("reuse_direction", grad_fn, params)

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
            finite = jnp.isfinite(tree_math.norm(grads))
            direction = optax.tree.where(finite, direction, old)
            return grads, perturbation_state, direction

        carry = (updates, state.perturbation_state, state.direction)
        grads, perturbation_state, direction = when.run(state.step, sharp, carry)
        if not when.always:
            weight = jnp.where(when.is_due(state.step), 0, value_at(alpha, state.step))
            if layerwise:
                grads = jax.tree.map(lambda g, d: add_direction(g, d, weight), grads, direction)
            else:
                grads = add_direction(grads, direction, weight)
        step = optax.safe_increment(state.step)
        return grads, ReuseDirectionState(step, perturbation_state, direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def looksam(
    rho: optax.ScalarOrSchedule,
    *,
    every: int = 5,
    alpha: optax.ScalarOrSchedule = 0.7,
    layerwise: bool = False,
    start: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM's second gradient once in `every` updates, and its direction reused in between.

    .. math::
      g_t \leftarrow \nabla L(w + \rho \, g_t / \|g_t\|) \quad \text{or} \quad
      g_t + \alpha \|g_t\| \, v

    with v the unit vector of what the last sharp gradient added across the clean one.

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      every: one sharp update in `every`, >= 1; 5 to 10 are usual. Static.
      alpha: share of the reused direction, >= 0; 0.2 to 0.7 are usual. Like `rho`.
      layerwise: True: the ascent step is `scale_to_layer_norms(rho)`, and the direction is kept
        for each leaf apart (Look-LayerSAM, for large batches). Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      accumulator_dtype: dtype of the reused direction; None means that of the parameters.
        `jnp.bfloat16` halves the state of parameters in float32. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.looksam(rho=0.05, every=5, alpha=0.2), optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.1022  0.2045]

    References:
      Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization.
      arXiv:2203.02714

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra in `every` updates. State: one copy of
      the parameters, two integers; two temporary copies.
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = scale_to_layer_norms(rho) if layerwise else scale_to_norm(rho)
    return stage.off_when_zero(
        rho,
        reuse_direction(
            perturbation,
            every=every,
            alpha=alpha,
            layerwise=layerwise,
            start=start,
            accumulator_dtype=accumulator_dtype,
        ),
    )
