"""SWA (Izmailov et al., arXiv:1803.05407): the equal-weight mean of the weights along the run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks, registry

_SHAPES = ("cosine", "linear")


def equal_share(total: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The total weight :math:`n` with one model more, and that model's share :math:`1/n`."""
    return total + 1, 1 / (total + 1)


@registry.method("average")
def swa(
    *, start: int | None = None, every: int | None = None, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging: the equal-weight mean of the weights along the run.

    .. math:: \bar w_n = \bar w_{n-1} + (w_t - \bar w_{n-1}) / n

    Args:
      start: number of updates after which it first acts; None and 0 are `every`. Static.
      every: its period from there on, in updates, >= 1; None is 1. Static.
      accumulator_dtype: of the mean; None: float32, or wider where the parameters are. Static.

    Returns:
      A stage to be chained last; needs `params`. The mean is `eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.swa(), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> _, state = stage.update(zero, state, jnp.array(3.0))
      >>> print(flatopt.eval_params(state, jnp.array(3.0)))
      2.0

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Cost: 0 extra gradients; 1 copy.
    """

    def weighting(total: Any, number: Any, step: Any) -> tuple[jax.Array, jax.Array]:
        del number, step
        return equal_share(total)

    return running_mean(
        "swa", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )


def swa_schedule(
    init_value: float,
    swa_value: float,
    *,
    transition_steps: float,
    transition_begin: float = 0,
    shape: str = "cosine",
) -> optax.Schedule:
    r"""A learning rate that falls from one constant to another, and stays there to be averaged.

    .. math:: \eta_t = \eta_1 + (\eta_0 - \eta_1) \, k(x), \quad k(x) = \tfrac12 (1 + \cos \pi x)
      \text{ or } 1 - x, \quad x = \mathrm{clip}\big((t - begin) / steps, 0, 1\big)

    Args:
      init_value: :math:`\eta_0`, the rate before the transition, >= 0.
      swa_value: :math:`\eta_1`, the rate after it; often half to a twentieth of the first.
      transition_steps: length of the transition in updates, >= 0, whole or not. 0: a jump. Static.
      transition_begin: the count at which it begins, >= 0, whole or not. Static.
      shape: "cosine" or "linear". Static.

    Returns:
      A schedule: a function from the step count, from 0 on, to the learning rate.

    Examples:
      >>> import flatopt
      >>> schedule = flatopt.swa_schedule(0.1, 0.05, transition_steps=10)
      >>> print([round(float(schedule(t)), 4) for t in (0, 5, 10, 15)])
      [0.1, 0.075, 0.05, 0.05]

    References:
      As for `swa`.

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("init_value", init_value, low=0.0)
    checks.check_number("swa_value", swa_value, low=0.0)
    checks.check_number("transition_steps", transition_steps, low=0.0)
    checks.check_number("transition_begin", transition_begin, low=0.0)
    checks.check_choice("shape", shape, _SHAPES)

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
    r"""How many updates have been made when the first at the final, constant rate has been.

    .. math:: \min \{ t \ge 1 : \eta_{t-1} = \eta_t = \dots = \eta_{T-1} \}

    Args:
      schedule: function from the step count, from 0 on, to the learning rate.
      num_steps: length T of the run in updates, >= 2.

    Returns:
      A Python int, for `swa(start=...)` and its like; inside `jax.jit` too.

    Raises:
      ValueError: if the schedule changes up to its last step: it has no constant phase.

    Examples:
      >>> import optax, flatopt
      >>> schedule = flatopt.swa_schedule(0.1, 0.05, transition_steps=750)
      >>> print(flatopt.constant_phase_start(schedule, num_steps=1000))
      751

    Cost: 0 extra gradients; the schedule is called `num_steps` times, vectorised.
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
