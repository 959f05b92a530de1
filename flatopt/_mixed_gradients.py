"""Methods that follow a mix of the clean and the perturbed gradient: GSAM, GNP, WSAM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree
from flatopt._combiners import mix_clean, surrogate_gap
from flatopt._gradient_at import ascent_stage
from flatopt._perturbations import scale_to_adaptive_norm, scale_to_norm
from flatopt._schedules import value_at


def gsam(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    adaptive: str | None = None,
    minimize_perturbed: bool = True,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: SAM that also closes the surrogate gap, perturbed loss minus clean loss.

    With the clean gradient c and the perturbed one :math:`p = \nabla L(w + \rho \, c / \|c\|)`:

    .. math:: g \leftarrow p - \alpha \, c_{\perp p}

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count; the authors use
        `proportional_rho_schedule`. With the number 0 the stage is the identity and takes no
        gradient.
      alpha: weight of the gap, >= 0; 0 is `sam`, 0.1 to 0.6 are usual. Likewise.
      adaptive: None: as above. "torch": :math:`\epsilon = \rho w^2 c / \|w c\|`, as in the authors'
        PyTorch code. "big_vision": :math:`\epsilon = \rho |w| c / \|c\|`, as in their JAX code.
        Static.
      minimize_perturbed: False descends the clean loss, :math:`c + \alpha \, p_{\perp c}`. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.gsam(rho=0.5, alpha=0.4), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 1.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w[0] ** 2 + 4.0 * w[1] ** 2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.3109 -0.5712]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      The two adaptive forms are different methods under one name. Place: as for `sam`. Gradient
      evaluations: one extra per sharp update. State: three integers; two temporary copies of the
      parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    if adaptive is None:
        perturbation = scale_to_norm(rho)
    elif adaptive == "torch":
        perturbation = scale_to_adaptive_norm(rho)
    elif adaptive == "big_vision":
        perturbation = optax.chain(scale_to_norm(rho), _times_weights())
    else:
        raise ValueError(f"adaptive={adaptive!r} must be None, 'torch' or 'big_vision'.")
    combiner = surrogate_gap(alpha, minimize_perturbed)
    return ascent_stage(rho, perturbation, combiner=combiner, start=start, every=every)


def gnp(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    normalize_clean: bool = False,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-norm penalty: descends :math:`L + \alpha \rho \|\nabla L\|`, to first order.

    .. math:: g \leftarrow (1 - \alpha) \, g + \alpha \, \nabla L(w + \rho \, g / \|g\|)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      alpha: the penalty's weight over rho: 1 is `sam`, 0.8 is usual. Likewise.
      normalize_clean: True mixes in the unit vector :math:`g / \|g\|` in place of g. That is the
        default of the authors' program, not their paper's formula; it changes the step size.
        Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.gnp(rho=0.5, alpha=0.8), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.324 -0.432 ]

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra per sharp update. State: three integers;
      two temporary copies of the parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    combiner = mix_clean(alpha, normalize_clean)
    return ascent_stage(rho, scale_to_norm(rho), combiner=combiner, start=start, every=every)


class WsamState(NamedTuple):
    """State of `wsam`.

    Attributes:
      stage_state: state of the stage that takes the perturbed gradient.
      inner_state: state of the wrapped optimiser.
    """

    stage_state: optax.OptState
    inner_state: optax.OptState


def wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 0.9,
    decouple: bool = True,
    adaptive: bool = False,
    max_norm: float | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: sharpness as a regulariser of its own weight, decoupled from the optimiser.

    With the clean gradient c, the perturbed one :math:`p = \nabla L(w + \rho \, c / \|c\|)`,
    :math:`\alpha = \gamma / (1 - \gamma)`, and u the update of `optimizer`:

    .. math::
      w \leftarrow w + u(c) - \eta \, \alpha \, (p - c)
      \qquad \text{or} \qquad w + u(\alpha \, p + (1 - \alpha) \, c)

    Args:
      optimizer: any optax transformation.
      learning_rate: :math:`\eta`, that of `optimizer`: a number, a traced array, or a schedule of
        the step count. Used by the decoupled form only.
      rho: radius, >= 0: likewise. With the number 0 this is `optimizer` and takes no gradient.
      gamma: weight of the sharpness, in [0, 1): 0 is `optimizer`, 0.5 coupled is `sam`, above it
        extrapolates. Likewise.
      decouple: True: the first form: momentum and preconditioner never see the sharpness. False:
        the second. Static.
      adaptive: True: the ascent step is `scale_to_adaptive_norm(rho)`. Static.
      max_norm: clip both gradients to this norm, each by itself, > 0; None: no clipping. The ascent
        step uses the gradient before clipping.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.wsam(optax.sgd(0.1), learning_rate=0.1, rho=0.5, gamma=0.8)
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.42 -0.56]

    References:
      Yue, Jiang, Ye, Gao, Liu, Zhang. Sharpness-Aware Minimization Revisited: Weighted Sharpness as
      a Regularization Term. arXiv:2305.15817

    Notes:
      Gradient evaluations: one extra per sharp update. State: that of `optimizer` and two integers;
      two temporary copies of the parameters.
    """
    _checks.check_number("learning_rate", learning_rate)
    _checks.check_number("rho", rho, low=0.0)
    _checks.check_number("gamma", gamma, low=0.0, high=1.0, high_allowed=False)
    if max_norm is not None:
        _checks.check_number("max_norm", max_norm, low=0.0)
    optimizer = optax.with_extra_args_support(optimizer)
    perturbation = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    stage = ascent_stage(rho, perturbation, start=start, every=every)
    off = _checks.is_zero(rho) or _checks.is_zero(gamma)

    def clip(grads: optax.Updates) -> optax.Updates:
        if max_norm is None:
            return grads
        # As torch.nn.utils.clip_grad_norm_ does, whose guard is 1e-6.
        return _tree.scale(jnp.minimum(max_norm / (_tree.norm(grads) + 1e-6), 1.0), grads)

    def init_fn(params: optax.Params) -> WsamState:
        return WsamState(stage.init(params), optimizer.init(params))

    def update_fn(
        updates: optax.Updates,
        state: WsamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WsamState]:
        if off:
            updates, inner = optimizer.update(
                clip(updates), state.inner_state, params, **extra_args
            )
            return updates, WsamState(state.stage_state, inner)
        step = state.stage_state.step
        sharp, stage_state = stage.update(updates, state.stage_state, params, **extra_args)
        clean, sharp = clip(updates), clip(sharp)
        share = value_at(gamma, step)
        alpha = share / (1 - share)
        if not decouple:
            mixed = jax.tree.map(
                lambda p, c: (alpha * p + (1 - alpha) * c).astype(p.dtype), sharp, clean
            )
            updates, inner = optimizer.update(mixed, state.inner_state, params, **extra_args)
            return updates, WsamState(stage_state, inner)
        updates, inner = optimizer.update(clean, state.inner_state, params, **extra_args)
        rate = value_at(learning_rate, step) * alpha
        updates = jax.tree.map(
            lambda u, p, c: (u - rate * (p - c)).astype(u.dtype), updates, sharp, clean
        )
        return updates, WsamState(stage_state, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times_weights() -> optax.GradientTransformation:
    """Multiplies by the magnitude of each weight."""

    def multiply(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        _checks.require_params("gsam", params)
        return jax.tree.map(lambda u, w: (jnp.abs(w) * u).astype(u.dtype), updates, params)

    return optax.stateless(multiply)
