"""WSAM (Yue et al., arXiv:2305.15817): sharpness as a regulariser of its own weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.stage import off_when_zero
from flatopt._core.timing import value_at
from flatopt._sam.ascent import scale_to_adaptive_norm, scale_to_norm
from flatopt._sam.combiners import mix
from flatopt._sam.gradient_at import ascent_stage


def sharpness_weight(gamma: Any) -> Any:
    r""":math:`\alpha = \gamma / (1 - \gamma)`."""
    return gamma / (1 - gamma)


def add_sharpness(updates: Any, perturbed: Any, clean: Any, weight: Any) -> Any:
    r"""The decoupled update, :math:`u - \eta \alpha \, (p - c)` with the weight eta alpha."""
    return tree_math.on_inexact(lambda u, p, c: u - weight * (p - c), updates, perturbed, clean)


def clip_to_norm(grads: Any, max_norm: Any) -> Any:
    """As `torch.nn.utils.clip_grad_norm_` does, whose guard is 1e-6."""
    if max_norm is None:
        return grads
    return tree_math.scale(jnp.minimum(max_norm / (tree_math.norm(grads) + 1e-6), 1.0), grads)


class WsamState(NamedTuple):
    """State of `wsam`.

    Attributes:
      stage_state: state of the stage that takes the perturbed gradient.
      inner_state: state of the wrapped optimiser.
    """

    stage_state: optax.OptState
    inner_state: optax.OptState


@registry.method("wrapper", needs=("grad_fn",))
def wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 0.9,
    decouple: bool = True,
    adaptive: bool = False,
    max_norm: jax.typing.ArrayLike | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: sharpness as a regulariser of its own weight, decoupled from the optimiser.

    .. math:: w + u(c) - \eta \alpha (p - c) \;\text{ or }\; w + u(\alpha p + (1 - \alpha) c)

    Args:
      optimizer, learning_rate: any optax transformation u, and its rate :math:`\eta`, like `rho`.
      rho: radius of `sam`, whose gradient is p (c: the clean one), >= 0: a number or a schedule.
      gamma: :math:`\alpha = \gamma / (1 - \gamma)`, in [0, 1): 0 is `optimizer`. Likewise.
      decouple, adaptive: False is the second form; True ascends `scale_to_adaptive_norm`. Static.
      max_norm: clip c and p, each by itself, to this norm, >= 0; None: no clipping.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A wrapper to be outermost; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.wsam(optax.sgd(0.1), 0.1, rho=0.5, gamma=0.8), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [-0.42 -0.56]

    References:
      Yue et al. Sharpness-Aware Minimization Revisited. arXiv:2305.15817

    Cost: 1 extra gradient; 0 copies (+2 temporary).
    """
    _check(learning_rate, rho, gamma, max_norm)
    optimizer = checks.as_transformation("optimizer", optimizer)
    perturbation = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    stage = off_when_zero(gamma, ascent_stage(rho, perturbation, start=start, every=every))
    off = checks.is_number(rho, 0) or checks.is_number(gamma, 0)

    def init_fn(params: optax.Params) -> WsamState:
        return WsamState(stage.init(params), optimizer.init(params))

    def update_fn(
        updates: optax.Updates,
        state: WsamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WsamState]:
        step = state.stage_state.step
        perturbed, stage_state = stage.update(updates, state.stage_state, params, **extra_args)
        clean, perturbed = (clip_to_norm(grads, max_norm) for grads in (updates, perturbed))
        alpha = sharpness_weight(value_at(gamma, step))
        # Without sharpness both gradients are one, but mixing would still round.
        grads = clean if off or decouple else mix(perturbed, clean, alpha)
        moves, inner_state = optimizer.update(grads, state.inner_state, params, **extra_args)
        if decouple and not off:
            moves = add_sharpness(moves, perturbed, clean, value_at(learning_rate, step) * alpha)
        return moves, WsamState(stage_state, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(learning_rate: Any, rho: Any, gamma: Any, max_norm: Any) -> None:
    checks.check_number("learning_rate", learning_rate)
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("gamma", gamma, low=0.0, high=1.0, high_allowed=False)
    if max_norm is not None:
        checks.check_number("max_norm", max_norm, low=0.0, schedule_allowed=False)
