"""Local entropy: a Langevin loop around the parameters, and the gradient that it estimates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _random, _tree
from flatopt._langevin import thermal_noise
from flatopt._schedules import value_at

# What an inner step is made of, in order; the momentum filters the first so many of them.
TERMS = ("gradient", "decay", "pull", "noise")


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
    inner_learning_rate: optax.ScalarOrSchedule = 0.1,
    noise: optax.ScalarOrSchedule | optax.GradientTransformation = 1e-4,
    momentum: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = True,
    averaging: optax.ScalarOrSchedule = 0.75,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    scale_by_gamma: bool = False,
    initial_gradient: bool = True,
    key: _random.KeyLike = 0,
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
    _checks.check_count("num_steps", num_steps, 0)
    _checks.check_count("automatic", automatic, 1)
    if momentum_over not in TERMS:
        raise ValueError(f"momentum_over={momentum_over!r} must be one of {', '.join(TERMS)}.")
    for name, rate in (
        ("gamma", gamma),
        ("inner_learning_rate", inner_learning_rate),
        ("weight_decay", weight_decay),
    ):
        _checks.check_number(name, rate, low=0.0)
    for name, share in (
        ("momentum", momentum),
        ("averaging", averaging),
        ("dampening", dampening),
    ):
        _checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)
    kick = _noise(noise, inner_learning_rate, key)
    has_momentum = not _checks.is_zero(momentum)
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
        grad_fn: _checks.GradientFunction | None = None,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LocalEntropyState]:
        _checks.require_params("local_entropy", params)
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

        start = jax.tree.map(lambda w: w.astype(_tree.accumulator_dtype(w.dtype)), params)
        buffer = optax.tree.zeros_like(start) if has_momentum else None
        carry = (start, start, buffer, state.noise_state)
        first = 1 if initial_gradient and num_steps else 0
        if first:
            carry = descend(jnp.zeros([], jnp.int32), updates, carry)
        if num_steps > first:
            gradient = _checks.require_grad_fn("local_entropy", grad_fn)
            _checks.require_whole_tree("local_entropy", params)

            def body(number: jax.Array, carry: Any) -> Any:
                grads = gradient(optax.tree.cast_like(carry[0], params), number - first)
                return descend(number, grads, carry)

            carry = jax.lax.fori_loop(first, num_steps, body, carry)
        _, mean, _, noise_state = carry

        away = jax.tree.map(jnp.subtract, start, mean)
        unit = state.unit
        if measuring is not None:
            # The stiffness at which the spring, as far as it is stretched, weighs as the loss does.
            found = _tree.ratio_or_zero(value, 0.5 * _tree.vdot(away, away))
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
    key: _random.KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """The stage that adds the noise to each displacement of the loop."""
    if isinstance(noise, optax.GradientTransformation):
        return optax.with_extra_args_support(noise)
    _checks.check_number("noise", noise, low=0.0)
    temperature = (lambda step: noise(step) ** 2) if callable(noise) else noise**2
    return thermal_noise(learning_rate, temperature, key)
