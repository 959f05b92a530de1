"""Schedules of radii and learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import _checks

_SHAPES = ("cosine", "linear")


def value_at(value: optax.ScalarOrSchedule, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The number `value`, or the value of the schedule `value` at `step`."""
    return value(step) if callable(value) else value


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
    _checks.check_number("init_value", init_value, low=0.0)
    _checks.check_number("swa_value", swa_value, low=0.0)
    _checks.check_number("transition_steps", transition_steps, low=0.0)
    _checks.check_number("transition_begin", transition_begin, low=0.0)
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


def cyclic_triangle_schedule(max_value: float, min_value: float, period: int) -> optax.Schedule:
    r"""A learning rate that falls and rises linearly, period after period: that of FGE.

    .. math::
      \eta_t = \eta_{\max} + (\eta_{\min} - \eta_{\max}) \, (1 - |1 - 2 x|), \qquad
      x = (t \bmod period) / period

    Args:
      max_value: the rate at the ends of a period.
      min_value: the rate in its middle.
      period: number of updates in a period, >= 2. Static.

    Returns:
      A schedule: a function from the step count, from 0 on, to the learning rate.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import flatopt
      >>> schedule = flatopt.cyclic_triangle_schedule(0.05, 0.01, period=4)
      >>> print([round(float(schedule(t)), 4) for t in range(6)])
      [0.05, 0.03, 0.01, 0.03, 0.05, 0.03]

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Notes:
      The authors take a model after update `period // 2` of each period, counted from 1, just
      before the lowest rate is used: `snapshots(number, start=period // 2, every=period)`.
    """
    _checks.check_number("max_value", max_value, low=0.0)
    _checks.check_number("min_value", min_value, low=0.0)
    _checks.check_count("period", period, 2)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        x = (jnp.asarray(count) % period) / period
        return max_value + (min_value - max_value) * (1 - jnp.abs(1 - 2 * x))

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
    _checks.check_count("num_steps", num_steps, 2)
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


def proportional_rho_schedule(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float,
    learning_rate_max: float,
    learning_rate_min: float,
) -> optax.Schedule:
    r"""A radius that rises and falls with the learning rate, as in GSAM.

    .. math::
      \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
        \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

    Args:
      learning_rate: the schedule :math:`\eta_t` that the optimiser uses.
      rho_max: radius at the highest learning rate, >= 0.
      rho_min: radius at the lowest, >= 0.
      learning_rate_max: the highest learning rate.
      learning_rate_min: the lowest learning rate; if both are equal the radius is `rho_max`.

    Returns:
      A schedule of the step count. It never falls below 0: during a warm-up that starts below
      `learning_rate_min` the formula alone would turn the ascent into a descent.

    Raises:
      ValueError: if a radius is negative, or the highest learning rate is below the lowest.

    Examples:
      >>> import optax
      >>> import flatopt
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, 10)
      >>> rho = flatopt.proportional_rho_schedule(learning_rate, 0.6, 0.1, 0.1, 0.0)
      >>> print(f"{rho(0):.2f} {rho(5):.2f} {rho(10):.2f}")
      0.60 0.35 0.10

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      To be passed as `rho` to `gsam` or any other method.
    """
    _checks.check_number("rho_max", rho_max, low=0.0)
    _checks.check_number("rho_min", rho_min, low=0.0)
    _checks.check_number("learning_rate_max", learning_rate_max, low=learning_rate_min)
    span = learning_rate_max - learning_rate_min
    if span == 0:
        return optax.constant_schedule(rho_max)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        share = (learning_rate(step) - learning_rate_min) / span
        return jnp.maximum(rho_min + (rho_max - rho_min) * share, 0.0)

    return schedule


def exponential_scoping(
    init_value: float, rate: float, every: int | None = None, max_value: float | None = None
) -> optax.Schedule:
    r"""A stiffness that grows exponentially: Entropy-SGD's scoping, rSGD's and Parle's focusing.

    .. math:: \gamma_t = \min\{ \gamma_0 (1 + r)^{\lfloor t / k \rfloor}, \gamma_{max} \}

    Args:
      init_value: :math:`\gamma_0` >= 0, the value at step 0.
      rate: r >= 0, relative growth in one period. To grow by a factor f in n periods:
        `f ** (1 / n) - 1`.
      every: k, steps in a period, >= 1; None means 1. Static.
      max_value: :math:`\gamma_{max}` >= 0; None means no limit.

    Returns:
      A schedule: a function of the step count.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import flatopt
      >>> gamma = flatopt.exponential_scoping(0.5, rate=0.1, every=10)
      >>> print(gamma(0), gamma(9), gamma(20))
      0.5 0.5 0.605

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent Into Wide Valleys. arXiv:1611.01838

    Notes:
      Costs nothing. Where a program raises gamma before it uses it for the first time, its
      `init_value` here is :math:`\gamma_0 (1 + r)`.
    """
    _checks.check_number("init_value", init_value, low=0.0)
    _checks.check_number("rate", rate, low=0.0)
    _checks.check_count("every", every, 1)
    if max_value is not None:
        _checks.check_number("max_value", max_value, low=0.0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        periods = jnp.asarray(jnp.asarray(count) // (every or 1), jnp.result_type(float))
        value = init_value * (1 + rate) ** periods
        return value if max_value is None else jnp.minimum(value, max_value)

    return schedule
