"""ScheduleFree+ (Defazio, arXiv:2605.19095): an average instead of a schedule, Polyak's step."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, tree_math
from flatopt._core.timing import Every, nonnegative_at, value_at

SMALLEST_RATE = 1e-8  # Of the largest step so far, so that the first models have a weight.


class ScheduleFreePlusState(NamedTuple):
    """State of `schedule_free_plus`.

    Attributes:
      step: int32 scalar, number of updates so far.
      x: tree like the parameters, the average, in the accumulator's dtype.
      z: likewise, where the steps lead.
      inner_state: state of the direction.
      norm_mean: float scalar, running mean of the gradients' 1-norms, not debiased.
      rate: float scalar, size of the last step, which no one has set.
      max_rate: float scalar, the largest one so far.
      total_weight: float scalar, sum of the weights of the models in the average.
    """

    step: jax.Array
    x: optax.Params
    z: optax.Params
    inner_state: optax.OptState
    norm_mean: jax.Array
    rate: jax.Array
    max_rate: jax.Array
    total_weight: jax.Array

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the average x in the dtypes of `params`."""
        return means.evaluated(self.x, params)


def norm_1(grads: optax.Updates) -> jax.Array:
    """Sum of the absolute values, in float32 at least."""
    dtype = tree_math.scalar_dtype(grads)
    leaves = filter(tree_math.is_inexact, jax.tree.leaves(grads))
    return sum((jnp.sum(jnp.abs(g), dtype=dtype) for g in leaves), jnp.zeros([], dtype))


def polyak_step(value: Any, grads: Any, x: Any, z: Any, *, beta: Any, norm: Any) -> jax.Array:
    r""":math:`\max(0, L(y) + \beta \, g \cdot (z - x)) \big/ \big(\sqrt{\pi/2} \, \|g\|_1\big)`."""
    rise = beta * tree_math.vdot(grads, tree_math.add_scaled(z, -1, x))
    return tree_math.ratio_or_zero(jnp.maximum(value + rise, 0), math.sqrt(math.pi / 2) * norm)


def descend(z: Any, y: Any, direction: Any, rate: Any, decay: Any) -> Any:
    r"""The iterate's step, :math:`z - \alpha (d + \alpha \lambda y)`."""
    return tree_math.add_scaled(z, -rate, tree_math.add_scaled(direction, rate * decay, y))


def weigh(
    state: ScheduleFreePlusState, rate: jax.Array, t: jax.Array, begun: Any, *, r: float, p: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest step, the total weight, and the share of model t: 1 until it has `begun`."""
    largest = jnp.maximum(rate, state.max_rate)
    weight = t.astype(largest.dtype) ** r * largest**p
    total = state.total_weight + weight
    share = jnp.where(begun, tree_math.ratio_or_zero(weight, total), 1)
    return largest, jnp.where(begun, total, state.total_weight), share


def between(x: Any, z: Any, beta: Any) -> Any:
    r"""Where the gradient is taken, :math:`y = \beta x + (1 - \beta) z`."""
    return means.towards(z, x, beta)


@registry.method("optimizer", needs=("value",))
def schedule_free_plus(
    direction: optax.GradientTransformation | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    beta: optax.ScalarOrSchedule = 0.9,
    r: float = 0.0,
    p: float = 2.0,
    norm_decay: float = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    start: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Training without a learning rate or its schedule: Polyak's steps, and their average.

    .. math:: z \leftarrow z - \alpha (d + \alpha \lambda y), x \leftarrow x + c (z - x), y = z +
      \beta (x - z), \, \alpha = \eta \max(0, L + \beta g \cdot (z - x)) / (\sqrt{\pi / 2} \|g\|_1)

    Args:
      direction: makes d of the gradient g at y; None is `optax.scale_by_adam(b2=0.95)`.
      learning_rate, beta: :math:`\eta \ge 0`, :math:`\beta \in [0, 1]`: or schedules.
      r, p: >= 0; model t weighs :math:`t^r (\max_{s \le t} \alpha_s)^p` in the average x.
      norm_decay, weight_decay: of a running mean of the 1-norms, in [0, 1); :math:`\lambda \ge 0`.
      start, accumulator_dtype: of the average, see `swa`; until then x is z.

    Returns:
      A whole optimiser; needs `params`, the points y, and `value=`, the loss there.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.schedule_free_plus(), jnp.array(2.0)
      >>> print(f"{tx.update(w, tx.init(w), w, value=0.5 * w**2)[0]:.3f}")
      -0.798

    References:
      Defazio. ScheduleFree+. arXiv:2605.19095

    Cost: 0 extra gradients; 4 copies, Adam's two among them.
    """
    _check(learning_rate, beta, weight_decay, r=r, p=p, norm_decay=norm_decay)
    when = Every.after_update(start, None)
    if direction is None:
        direction = optax.scale_by_adam(b1=0.9, b2=0.95)
    direction = checks.as_transformation("direction", direction)

    def update_fn(
        updates: Any, state: ScheduleFreePlusState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScheduleFreePlusState]:
        checks.require_params("schedule_free_plus", params)
        value = checks.require_value("schedule_free_plus", extra_args.get("value"))
        step, b = optax.safe_increment(state.step), value_at(beta, state.step)
        norm_mean = norm_decay * state.norm_mean + (1 - norm_decay) * norm_1(updates)
        norm = norm_mean / (1 - norm_decay**step)
        rate = polyak_step(value, updates, state.x, state.z, beta=b, norm=norm)
        rate *= nonnegative_at(learning_rate, state.step)
        d, inner_state = direction.update(updates, state.inner_state, params, **extra_args)
        z = descend(state.z, params, d, rate, value_at(weight_decay, state.step))
        largest, total, share = weigh(state, rate, step, when.is_due(step), r=r, p=p)
        x = means.towards(state.x, z, share)
        moves = means.moves(between(x, z, b), params, updates)
        new = (step, x, z, inner_state, norm_mean, rate, largest, total)
        return moves, ScheduleFreePlusState(*tree_math.cast_like(new, tuple(state)))

    init_fn = functools.partial(_init, direction, accumulator_dtype)
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init(
    direction: optax.GradientTransformation, dtype: Any, params: optax.Params
) -> ScheduleFreePlusState:
    x, z = (means.copy(params, dtype) for _ in range(2))
    norm_mean = jnp.zeros([], tree_math.scalar_dtype(params))
    rate, total = (jnp.zeros([], jnp.result_type(float)) for _ in range(2))
    largest, step = jnp.full([], SMALLEST_RATE, rate.dtype), jnp.zeros([], jnp.int32)
    inner_state = direction.init(params)
    return ScheduleFreePlusState(step, x, z, inner_state, norm_mean, rate, largest, total)


def _check(learning_rate: Any, beta: Any, weight_decay: Any, **others: float) -> None:
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_number("beta", beta, low=0.0, high=1.0)
    checks.check_number("weight_decay", weight_decay, low=0.0)
    norm_decay = others.pop("norm_decay")
    checks.check_number(
        "norm_decay", norm_decay, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
    )
    for name, value in others.items():
        checks.check_number(name, value, low=0.0, schedule_allowed=False)
