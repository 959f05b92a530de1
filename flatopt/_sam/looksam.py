"""LookSAM (Liu et al., arXiv:2203.02714): a sharp gradient now and then, reused in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, stage, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import Every, value_at
from flatopt._sam.ascent import climb_to_norm, scale_to_norm


def climb_to_layer_norms(grads: Any, params: Any, rho: Any) -> Any:
    r""":math:`\rho \, \|w_l\| \, g_l / (\|g_l\| + 10^{-12})` of each leaf l."""
    return jax.tree.map(lambda g, w: climb_to_norm(g, rho * tree_math.norm(w)), grads, params)


def unit_across(perturbed: Any, clean: Any) -> Any:
    r""":math:`v = p_{\perp c} / \|p_{\perp c}\|`; zeros where p and c are parallel, or one is 0."""
    size = tree_math.norm(clean)
    inverse = tree_math.ratio_or_zero(1, size)
    unit = jax.tree.map(lambda c: inverse * c, clean)
    # The published programs divide by |c|^2 + 1e-12, which small gradients must not feel.
    guard = jnp.minimum(1e-6 / size, 1e-4) ** 2
    parallel = tree_math.vdot(unit, perturbed) / (1 + guard)
    # Of `clean`: to keep `unit` would take a copy of the parameters (test_temporary_copies).
    across = tree_math.add_scaled(perturbed, -parallel * inverse, clean)
    length = tree_math.norm(across)
    # What rounding and the guard leave of parallel gradients is no direction.
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(perturbed) if tree_math.is_inexact(x)]
    rounding = max((jnp.finfo(dtype).eps for dtype in dtypes), default=0.0)
    noise = (8 * rounding + 2 * guard) * tree_math.norm(perturbed)
    return tree_math.scale(jnp.where((length > noise) & (size > 0), 1 / length, 0), across)


def add_direction(clean: Any, direction: Any, alpha: Any) -> Any:
    r""":math:`c + \alpha \|c\| v`."""
    return tree_math.add_scaled(clean, alpha * tree_math.norm(clean), direction)


def scale_to_layer_norms(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf of the gradient to a share of the norm of its weights.

    .. math:: \epsilon_l = \rho \, \|w_l\| \, g_l / (\|g_l\| + 10^{-12})

    Args:
      rho: length of each leaf's displacement over the norm of its weights, >= 0: a number, a traced
        array, or a schedule.

    Returns:
      A perturbation; needs `params`. Zero gradients and zero weights give zero; inf or NaN give
      NaN.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.scale_to_layer_norms(0.1)
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}
      >>> grads = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([-7.0])}
      >>> print(*perturbation.update(grads, perturbation.init(params), params)[0].values())
      [0.  0.5] [-0.2]

    References:
      Liu et al. Towards Efficient and Scalable Sharpness-Aware Minimization. arXiv:2203.02714

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    return stage.perturbation(climb_to_layer_norms, needs_params="scale_to_layer_norms", rho=rho)


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


@registry.method("stage", needs=("grad_fn",))
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

    .. math:: p = \nabla L(w + \epsilon(c)), \quad \text{then} \quad c + \alpha \|c\| v

    Args:
      perturbation: from the gradient c to a displacement, as for `gradient_at`.
      every, start: when p is taken; see `gradient_at`. Before the first v, c passes.
      alpha: share of v, the part of p across c at length 1, >= 0: a number, an array, a schedule.
      layerwise, accumulator_dtype: whether v and the norm of c are each leaf's; dtype of v. Static.

    Returns:
      A stage to be chained before an optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.reuse_direction(flatopt.scale_to_norm(1.0), alpha=0.5), jnp.ones(2)
      >>> c, grad_fn = jnp.array([3.0, 0.0]), lambda w, i: jnp.array([3.0, 2.0])
      >>> _, state = tx.update(c, tx.init(w), w, grad_fn=grad_fn)
      >>> print(tx.update(c, state, w, grad_fn=grad_fn)[0])
      [3.  1.5]

    References:
      Liu et al. Towards Efficient and Scalable Sharpness-Aware Minimization. arXiv:2203.02714

    Cost: 1 extra gradient in `every` updates; 1 copy (+2 temporary).
    """
    when = Every.before_update(start, every)
    checks.check_number("alpha", alpha, low=0.0)
    perturbation = checks.as_transformation("perturbation", perturbation)

    def each(function: Any, *trees: Any) -> Any:
        return jax.tree.map(function, *trees) if layerwise else function(*trees)

    def init_fn(params: optax.Params) -> ReuseDirectionState:
        direction = jax.tree.map(lambda p: _zeros(p, accumulator_dtype), params)
        return ReuseDirectionState(jnp.zeros([], jnp.int32), perturbation.init(params), direction)

    def update_fn(
        updates: optax.Updates,
        state: ReuseDirectionState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseDirectionState]:
        gradient = checks.require_grad_fn("reuse_direction", grad_fn, params)
        extra_args["step"] = state.step

        def sharp(carry: Any) -> Any:
            clean, ascent, old = carry
            displacement, ascent = perturbation.update(clean, ascent, params, **extra_args)
            grads = gradient(optax.apply_updates(params, displacement), 0)
            grads = tree_math.cast_like(grads, updates)
            new = tree_math.cast_like(each(unit_across, grads, clean), old)
            # Else one overflow would spoil the next updates too.
            finite = jnp.isfinite(tree_math.norm(clean) + tree_math.norm(grads))
            return grads, ascent, optax.tree.where(finite, new, old)

        carry = (updates, state.perturbation_state, state.direction)
        grads, ascent, direction = when.run(state.step, sharp, carry)
        if not when.always:
            share = jnp.where(when.is_due(state.step), 0, value_at(alpha, state.step))
            grads = each(lambda c, v: add_direction(c, v, share), grads, direction)
        step = optax.safe_increment(state.step)
        return grads, ReuseDirectionState(step, ascent, direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros(param: jax.Array, dtype: Any) -> jax.Array:
    own = jnp.result_type(param)
    return jnp.zeros_like(param, None if dtype is None else means.with_complex(dtype, own))


@registry.method("stage", needs=("grad_fn",))
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

    .. math:: p = \nabla L(w + \rho \, c / \|c\|), \quad v = p_{\perp c} / \|p_{\perp c}\|
      \qquad \text{and then} \qquad c + \alpha \|c\| v

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      every, start: when p is taken; see `gradient_at`. 5 to 10 are usual for `every`.
      alpha: share of the reused direction, >= 0; 0.2 to 0.7 are usual. Like `rho`.
      layerwise: True: climb by `scale_to_layer_norms(rho)`, and keep a v for each leaf. Static.
      accumulator_dtype: dtype of v; None is that of the parameters. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.looksam(rho=0.5, every=5, alpha=0.2), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.3 4.4]

    References:
      Liu et al. Towards Efficient and Scalable Sharpness-Aware Minimization. arXiv:2203.02714

    Cost: 1 extra gradient in `every` updates; 1 copy (+2 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = scale_to_layer_norms(rho) if layerwise else scale_to_norm(rho)
    reuse = reuse_direction(
        perturbation,
        every=every,
        alpha=alpha,
        layerwise=layerwise,
        start=start,
        accumulator_dtype=accumulator_dtype,
    )
    return stage.off_when_zero(rho, reuse)
