"""Schedules of radii and learning rates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import value_at
from flatopt._entropy.langevin import thermal_noise

# What an inner step is made of, in order; the momentum filters the first so many of them.
TERMS = ("gradient", "decay", "pull", "noise")


def exponential_scoping(
    init_value: float, rate: float, *, every: int | None = None, max_value: float | None = None
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
    checks.check_number("init_value", init_value, low=0.0)
    checks.check_number("rate", rate, low=0.0)
    checks.check_count("every", every, 1)
    if max_value is not None:
        checks.check_number("max_value", max_value, low=0.0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        periods = jnp.asarray(jnp.asarray(count) // (every or 1), jnp.result_type(float))
        value = init_value * (1 + rate) ** periods
        return value if max_value is None else jnp.minimum(value, max_value)

    return schedule


class LocalEntropyState(NamedTuple):
    """State of `local_entropy`.

    Attributes:
      step: int32 scalar, number of updates so far.
      unit: float scalar, unit of gamma: 1 unless `automatic`.
      noise_state: state of the noise: a counter and a random key.
    """

    step: jax.Array
    unit: jax.Array
    noise_state: optax.OptState


def local_entropy(
    num_steps: int,
    gamma: optax.ScalarOrSchedule,
    *,
    inner_learning_rate: optax.ScalarOrSchedule = 0.1,
    noise: optax.ScalarOrSchedule | optax.GradientTransformation = 1e-4,
    momentum: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = True,
    averaging: optax.ScalarOrSchedule = 0.75,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    scale_by_gamma: bool = False,
    initial_gradient: bool = True,
    key: rng.KeyLike = 0,
    dampening: optax.ScalarOrSchedule = 0.0,
    momentum_over: str = "decay",
    automatic: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient of the loss by that of the local entropy.

    .. math::
      y &\leftarrow y - \eta \, [\nabla L_i(y) + \gamma (y - w)]
          + \sqrt{2 \eta} \, \varepsilon \, \xi, \qquad
      \mu \leftarrow a \mu + (1 - a) y \qquad (y_0 = \mu_0 = w) \\
      g &\leftarrow \gamma \, (w - \mu) \approx
        - T \, \nabla_w \log \int e^{-[L(y) + \frac{\gamma}{2} \|y - w\|^2] / T} \, dy, \qquad
        T = \varepsilon^2

    A loop of Langevin steps explores the loss around the parameters on a spring; its mean says
    where the wide part lies. The parameters do not move during the loop.

    Args:
      num_steps: L, Langevin steps in an update, >= 0; 5 to 20 are usual. With 0 the gradient
        passes through untouched. Static.
      gamma: stiffness >= 0 of the spring, in units of curvature: a number, a traced array, or a
        schedule of the step count such as `exponential_scoping`.
      inner_learning_rate: :math:`\eta` >= 0 of the loop: likewise. Stable below
        2 / (curvature + gamma).
      noise: :math:`\varepsilon` >= 0, the root of the temperature: likewise. Or a transformation,
        given each displacement `y_new - y` before it is made, `y` as parameters, `step=` and
        `inner_step=`, that returns the displacement to make instead.
      momentum: of the loop, in [0, 1): likewise. The buffer starts from zero in every update.
      nesterov: whether that momentum is Nesterov's. Static.
      averaging: a, in [0, 1), weight of the past in the mean :math:`\mu`: likewise.
      weight_decay: coefficient >= 0 of an L2 penalty inside the loop: likewise.
      scale_by_gamma: whether to emit :math:`\gamma (w - \mu)`, as the formula says, or
        :math:`w - \mu`, as most published code does. Static.
      initial_gradient: whether the incoming gradient is used as that of the first inner step. False
        ignores it, at the price of one more evaluation. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      dampening: share in [0, 1) of gradient and decay that is kept out of the momentum's buffer, as
        in PyTorch: likewise.
      momentum_over: last of "gradient", "decay", "pull", "noise" that the momentum filters; what
        comes after it is added to the filtered step. Static.
      automatic: number >= 1 of first updates that run without the spring and measure the unit of
        `gamma`: the loss `value` over :math:`\frac12 \|w - \mu\|^2`. From then on gamma is a
        multiple of the unit found last, and `update` needs `value=loss`. None: the unit is 1.
        Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and, unless the loop has
      no gradient of its own to take, `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, `params`, `grad_fn` or `value` is missing, or the
        stage stands inside `optax.masked`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> curvature = jnp.array([1.0, 100.0])  # a wide and a narrow valley
      >>> grad_fn = lambda w, i: curvature * w
      >>> stage = flatopt.local_entropy(400, gamma=10.0, inner_learning_rate=0.01, noise=0.0,
      ...     averaging=0.9, scale_by_gamma=True)
      >>> w = jnp.array([1.0, 1.0])
      >>> grads, _ = stage.update(grad_fn(w, 0), stage.init(w), w, grad_fn=grad_fn)
      >>> # gamma c / (gamma + c): the narrow one counts for less than its curvature.
      >>> print(f"{grads[0]:.3f} {grads[1]:.3f}")
      0.909 9.091

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent Into Wide Valleys. arXiv:1611.01838

      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

    Notes:
      Place: first in its chain; what stands after it sees the gradient of the local entropy. The
      paper's own noise is :math:`\sqrt2 \varepsilon`. For large gamma (with
      :math:`\eta \approx 1/\gamma`) the scaled result is the plain gradient. Inner step number l
      takes its gradient from `grad_fn(y, i)` with i = l - 1, or l without `initial_gradient`: pick
      minibatch i there. Gradient evaluations: L - 1 extra, or L without `initial_gradient`. State:
      two scalars, and a counter and a key for the noise; no copy of the parameters. Temporaries: y,
      :math:`\mu` and, with momentum, its buffer, in float32 at least.
    """
    checks.check_count("num_steps", num_steps, 0)
    checks.check_count("automatic", automatic, 1)
    if momentum_over not in TERMS:
        raise ValueError(f"momentum_over={momentum_over!r} must be one of {', '.join(TERMS)}.")
    for name, rate in (
        ("gamma", gamma),
        ("inner_learning_rate", inner_learning_rate),
        ("weight_decay", weight_decay),
    ):
        checks.check_number(name, rate, low=0.0)
    for name, share in (
        ("momentum", momentum),
        ("averaging", averaging),
        ("dampening", dampening),
    ):
        checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)
    kick = _noise(noise, inner_learning_rate, key)
    has_momentum = not checks.is_number(momentum, 0)
    over_decay, over_pull, over_noise = (
        TERMS.index(momentum_over) >= TERMS.index(term) for term in TERMS[1:]
    )

    def init_fn(params: optax.Params) -> LocalEntropyState:
        return LocalEntropyState(
            step=jnp.zeros([], jnp.int32),
            unit=jnp.ones([], jnp.result_type(float)),
            noise_state=kick.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: LocalEntropyState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LocalEntropyState]:
        checks.require_params("local_entropy", params)
        if automatic is not None and value is None:
            raise ValueError(
                "flatopt.local_entropy(automatic=...) measures gamma in units of the loss. Call "
                "`tx.update(grads, opt_state, params, value=loss, grad_fn=grad_fn)`."
            )

        def now(hyperparameter: optax.ScalarOrSchedule) -> Any:
            return value_at(hyperparameter, state.step)

        rate, decay, beta, past = map(now, (inner_learning_rate, weight_decay, momentum, averaging))
        undamped = 1 - now(dampening)
        measuring = None if automatic is None else state.step < automatic
        stiffness = now(gamma) * state.unit
        pull = stiffness if measuring is None else jnp.where(measuring, 0, stiffness)

        def force(y: jax.Array, w: jax.Array, with_decay: bool, with_pull: bool) -> jax.Array:
            """The part of a displacement that needs no gradient."""
            total = decay * y if with_decay else jnp.zeros_like(y)
            return (-rate * (total + pull * (y - w) if with_pull else total)).astype(y.dtype)

        def descend(number: Any, grads: optax.Updates, carry: Any) -> Any:
            point, mean, buffer, noise_state = carry
            own = jax.tree.map(
                lambda g, y, w: (force(y, w, over_decay, False) - rate * g).astype(y.dtype),
                grads,
                point,
                params,
            )
            spring = jax.tree.map(lambda y, w: force(y, w, False, over_pull), point, params)
            move = jax.tree.map(jnp.add, own, spring)
            if has_momentum:
                buffer = jax.tree.map(
                    lambda v, d, s: (beta * v + undamped * d + s).astype(v.dtype),
                    buffer,
                    own,
                    spring,
                )
                if nesterov:
                    move = jax.tree.map(lambda d, v: (d + beta * v).astype(d.dtype), move, buffer)
                else:
                    move = buffer
            move = jax.tree.map(
                lambda d, y, w: d + force(y, w, not over_decay, not over_pull), move, point, params
            )
            kicked, noise_state = kick.update(
                move, noise_state, point, **extra_args, step=state.step, inner_step=number
            )
            if has_momentum and over_noise:
                buffer = jax.tree.map(lambda v, new, old: v + (new - old), buffer, kicked, move)
            point = jax.tree.map(jnp.add, point, kicked)
            mean = jax.tree.map(
                lambda m, y: (past * m + (1 - past) * y).astype(m.dtype), mean, point
            )
            return point, mean, buffer, noise_state

        start = jax.tree.map(lambda w: w.astype(tree_math.accumulator_dtype(w.dtype)), params)
        buffer = optax.tree.zeros_like(start) if has_momentum else None
        carry = (start, start, buffer, state.noise_state)
        first = 1 if initial_gradient and num_steps else 0
        if first:
            carry = descend(jnp.zeros([], jnp.int32), updates, carry)
        if num_steps > first:
            gradient = checks.require_grad_fn("local_entropy", grad_fn, params)

            def body(number: jax.Array, carry: Any) -> Any:
                grads = gradient(optax.tree.cast_like(carry[0], params), number - first)
                return descend(number, grads, carry)

            carry = jax.lax.fori_loop(first, num_steps, body, carry)
        _, mean, _, noise_state = carry

        away = jax.tree.map(jnp.subtract, start, mean)
        unit = state.unit
        if measuring is not None:
            # The stiffness at which the spring, as far as it is stretched, weighs as the loss does.
            found = tree_math.ratio_or_zero(value, 0.5 * tree_math.vdot(away, away))
            unit = jnp.where(measuring, found, unit).astype(unit.dtype)
        if num_steps:
            factor = now(gamma) * unit if scale_by_gamma else 1
            updates = jax.tree.map(lambda g, d: (factor * d).astype(g.dtype), updates, away)
        step = optax.safe_increment(state.step)
        return updates, LocalEntropyState(step, unit, noise_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _noise(
    noise: optax.ScalarOrSchedule | optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    key: rng.KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """The stage that adds the noise to each displacement of the loop."""
    if isinstance(noise, optax.GradientTransformation):
        return optax.with_extra_args_support(noise)
    checks.check_number("noise", noise, low=0.0)
    temperature = (lambda step: noise(step) ** 2) if callable(noise) else noise**2
    return thermal_noise(learning_rate, temperature, key)
