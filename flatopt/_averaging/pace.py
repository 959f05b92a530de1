"""PACE (Au, Block, arXiv:2606.25086): AdamW, pulled to the mean at which it will be evaluated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, stage, tree_math
from flatopt._core.timing import Every, value_at

SMALLEST_SHARE = 1e-4  # Of the newest weights in the mean; the authors' program has it too.


class PaceState(NamedTuple):
    """State of `pace`.

    Attributes:
      step: int32 scalar, number of updates so far.
      inner_state: state of Adam.
      mean: tree like the parameters, the exponential mean that they are pulled to, in the
        accumulator's dtype.
    """

    step: jax.Array
    inner_state: optax.OptState
    mean: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean in the dtypes of `params`."""
        return means.evaluated(self.mean, params)


def newest_share(t: jax.Array, *, kappa: Any, gamma: Any, offset: Any) -> jax.Array:
    r""":math:`d_t = \max((1 + \gamma \max(t - \rho, 0))^{-\kappa}, 10^{-4})`, rho the offset."""
    time = (1 + gamma * jnp.maximum(t - offset, 0)).astype(jnp.result_type(float))
    return jnp.maximum(time**-kappa, SMALLEST_SHARE)


def pull(mean: Any, params: Any, nu: Any, strength: Any, eps: Any, *, clip: bool) -> optax.Updates:
    r"""The pull to the mean, :math:`\min(1, c / (\sqrt{\hat v} + \epsilon)) \, (\bar w - w)`."""

    def leaf(mean: jax.Array, param: jax.Array, nu: jax.Array) -> jax.Array:
        share = strength / (jnp.sqrt(nu.real) + eps)
        return (jnp.minimum(share, 1) if clip else share) * (mean - param)

    return tree_math.on_inexact(leaf, tree_math.widened(mean, params), params, nu)


@registry.method("optimizer")
def pace(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule = 0.15,
    *,
    kappa: float = 0.2,
    gamma: float = 1.0,
    offset: float = 0.0,
    decay: float | None = None,
    clip: bool = True,
    every: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose weights are pulled to their exponential mean, at which it is evaluated.

    .. math:: w \leftarrow w + u_t + \min(1, \eta c d_t / (\sqrt{\hat v_t} + \epsilon)) (\bar w - w)

    Args:
      learning_rate, strength: :math:`\eta`, c, >= 0: numbers, traced arrays, or schedules.
      kappa, gamma, offset: of :math:`d_t = (1 + \gamma \max(t - \rho, 0))^{-\kappa}`, all >= 0.
      decay: 1 - d, in [0, 1), for a mean of fixed decay; then the pull has no :math:`d_t`.
      clip, every: whether there is the minimum; period of the mean, >= 1, None is 1. Static.
      b1, b2, eps, weight_decay, accumulator_dtype: as for `gadam`.

    Returns:
      A whole optimiser; needs `params`. The mean is `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.pace(0.1, weight_decay=0.0), jnp.array(1.0)
      >>> print(f"{flatopt.eval_params(tx.update(w, tx.init(w), w)[1], w):.3f}")
      0.913

    References:
      Au, Block. Training for the Model You Return: Improving Optimization for Iterate-Averaged
      Language Models. arXiv:2606.25086

    Cost: 0 extra gradients; 3 copies, Adam's two among them.
    """
    powers = {"kappa": kappa, "gamma": gamma, "offset": offset}
    _check((learning_rate, strength, weight_decay), (b1, b2, decay), eps=eps, **powers)
    when = Every.after_update(None, every)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)

    def init_fn(params: optax.Params) -> PaceState:
        mean = means.copy(params, accumulator_dtype)
        return PaceState(jnp.zeros([], jnp.int32), adamw.init(params), mean)

    def update_fn(
        updates: Any, state: PaceState, params: Any = None
    ) -> tuple[optax.Updates, PaceState]:
        step = optax.safe_increment(state.step)
        share: Any = newest_share(step, **powers)
        scale = value_at(learning_rate, state.step) * value_at(strength, state.step)
        share, scale = (share, scale * share) if decay is None else (1 - decay, scale)
        moves, inner_state = adamw.update(updates, state.inner_state, params)
        nu = optax.tree.bias_correction(inner_state[0].nu, b2, inner_state[0].count)
        moves = tree_math.add_scaled(moves, 1, pull(state.mean, params, nu, scale, eps, clip=clip))
        landed = means.reached(params, moves)
        mean = when.run(step, lambda mean: means.towards(mean, landed, share), state.mean)
        return moves, PaceState(step, inner_state, mean)

    return stage.needs_params("pace", optax.GradientTransformation(init_fn, update_fn))


def _check(scheduled: tuple[Any, ...], decays: tuple[Any, ...], **others: Any) -> None:
    names = ("learning_rate", "strength", "weight_decay")
    for name, value in zip(names, scheduled, strict=True):
        checks.check_number(name, value, low=0.0)
    for name, value in others.items():
        checks.check_number(name, value, low=0.0, schedule_allowed=False)
    for name, value in zip(("b1", "b2", "decay"), decays, strict=True):
        if value is not None:
            checks.check_number(
                name, value, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
            )
