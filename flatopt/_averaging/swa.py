"""SWA (Izmailov et al., arXiv:1803.05407): the equal-weight mean of the weights along the run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks

_SHAPES = ("cosine", "linear")


def swa(
    *, start: int | None = None, every: int | None = None, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging: the equal-weight mean of the weights along the run.

    .. math:: \bar w_n = \bar w_{n-1} + (w_t - \bar w_{n-1}) / n
       \quad \text{after updates } t = start, start + every, \dots

    Args:
      start: number of the first update, counted from 1, whose weights enter the mean; >= 0. None
        means with the first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.
      accumulator_dtype: dtype of the mean; None means float32 or the parameters' dtype, whichever
        is wider. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      mean with `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if `start` or `every` is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swa(start=2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      2.5

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      Place: last in its chain, since it averages `params + updates` as it sees them; inside
      `msam(...)`, not after it; inside `optax.MultiSteps`, where it counts whole steps. Needs a
      learning rate that stays high while it averages: the mean of a run that has decayed to zero is
      its last point. BatchNorm statistics belong to the last weights, not to the mean: recompute
      them. Gradient evaluations: none. State: one copy of the parameters and two scalars. Integer
      leaves are copied, not averaged. A NaN in the weights stays in the mean, as it does in the
      weights: `optax.apply_if_finite(chain, n)` skips such a step whole.
    """

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del number, step
        return total + 1, 1 / (total + 1)

    return running_mean(
        "swa", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )


def swa_schedule(
    init_value: float,
    swa_value: float,
    transition_steps: float,
    transition_begin: float = 0,
    shape: str = "cosine",
) -> optax.Schedule:
    r"""A learning rate that falls from one constant to another, and stays there to be averaged.

    .. math::
      \eta_t = \eta_{swa} + (\eta_0 - \eta_{swa}) \, k(x), \qquad
      x = \mathrm{clip}\Big(\frac{t - begin}{steps}, 0, 1\Big), \qquad
      k(x) = \tfrac12 (1 + \cos \pi x) \;\text{ or }\; 1 - x

    Args:
      init_value: :math:`\eta_0`, the rate before the transition.
      swa_value: :math:`\eta_{swa}`, the rate after it; often half to a twentieth of the first.
      transition_steps: length of the transition in updates, >= 0, whole or not. 0: a jump. Static.
      transition_begin: the count at which it begins, >= 0, whole or not. Static.
      shape: "cosine" or "linear". Static.

    Returns:
      A schedule: a function from the step count, from 0 on, to the learning rate.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import flatopt
      >>> schedule = flatopt.swa_schedule(0.1, 0.05, transition_steps=10)
      >>> print([round(float(schedule(t)), 4) for t in (0, 5, 10, 15)])
      [0.1, 0.075, 0.05, 0.05]

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      PyTorch's SWALR is `swa_schedule(lr, swa_lr, anneal_steps, shape="cosine")` or `"linear"`,
      counted from where it begins. The SWA authors' own training falls linearly from half of the
      way to the start of the average to nine tenths of it:
      `swa_schedule(lr, swa_lr, 0.4 * start, 0.5 * start, shape="linear")`. Start the average where
      the constant phase starts: `swa(start=constant_phase_start(schedule, steps))`.
    """
    checks.check_number("init_value", init_value, low=0.0)
    checks.check_number("swa_value", swa_value, low=0.0)
    checks.check_number("transition_steps", transition_steps, low=0.0)
    checks.check_number("transition_begin", transition_begin, low=0.0)
    if shape not in _SHAPES:
        raise ValueError(f"shape={shape!r} is unknown: it must be one of {', '.join(_SHAPES)}.")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        since = jnp.asarray(count) - transition_begin
        if transition_steps == 0:
            return jnp.where(since < 0, init_value, swa_value)
        x = jnp.clip(since / transition_steps, 0.0, 1.0)
        factor = (1 + jnp.cos(jnp.pi * x)) / 2 if shape == "cosine" else 1 - x
        # Exactly constant from there on, whatever the cosine of pi rounds to.
        return jnp.where(x >= 1, swa_value, swa_value + (init_value - swa_value) * factor)

    return schedule


def constant_phase_start(schedule: optax.Schedule, num_steps: int) -> int:
    r"""The number of the first update that the final, constant learning rate makes.

    .. math:: \min \{ t \ge 1 : \eta_{t-1} = \eta_t = \dots = \eta_{num\_steps - 1} \}

    Args:
      schedule: function from the step count, from 0 on, to the learning rate.
      num_steps: length of the run in updates, >= 2.

    Returns:
      A Python int, for `swa(start=...)` and its like, which count updates from 1.

    Raises:
      ValueError: if the schedule changes up to its last step: it has no constant phase.

    Examples:
      >>> import optax
      >>> import flatopt
      >>> schedule = flatopt.swa_schedule(0.1, 0.05, transition_steps=750)
      >>> start = flatopt.constant_phase_start(schedule, num_steps=1000)
      >>> print(start)
      751
      >>> tx = optax.chain(optax.sgd(schedule), flatopt.swa(start=start))

    Notes:
      Calls the schedule `num_steps` times, vectorised. Works inside `jax.jit` too, since nothing in
      it depends on traced values.
    """
    checks.check_count("num_steps", num_steps, 2)
    with jax.ensure_compile_time_eval():
        values = np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))
    changes = np.flatnonzero(values != values[-1])
    start = int(changes[-1]) + 2 if len(changes) else 1
    if start >= num_steps:
        raise ValueError(
            f"schedule has no constant phase within num_steps={num_steps}: it still changes at its "
            "last step. Average from a step of your choice with `start`, or use swa_schedule."
        )
    return start
