"""WSAM (Yue et al., arXiv:2305.15817): sharpness as a regulariser of its own weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math
from flatopt._core.timing import value_at
from flatopt._sam.ascent import scale_to_adaptive_norm, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


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
    *,
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
    checks.check_number("learning_rate", learning_rate)
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("gamma", gamma, low=0.0, high=1.0, high_allowed=False)
    if max_norm is not None:
        checks.check_number("max_norm", max_norm, low=0.0)
    optimizer = optax.with_extra_args_support(optimizer)
    perturbation = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    stage = ascent_stage(rho, perturbation, start=start, every=every)
    off = checks.is_number(rho, 0) or checks.is_number(gamma, 0)

    def clip(grads: optax.Updates) -> optax.Updates:
        if max_norm is None:
            return grads
        # As torch.nn.utils.clip_grad_norm_ does, whose guard is 1e-6.
        return tree_math.scale(jnp.minimum(max_norm / (tree_math.norm(grads) + 1e-6), 1.0), grads)

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
