"""The local entropy (Chaudhari et al., arXiv:1611.01838): a Langevin loop around the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, rng, tree_math
from flatopt._core.timing import value_at
from flatopt._entropy.langevin import thermal_noise


def decayed(g: Any, y: Any, decay: Any) -> Any:
    r"""The gradient with that of the L2 penalty, :math:`g + \lambda y`; one pass less without."""
    return g if checks.is_number(decay, 0) else g + decay * y


class Numbers(NamedTuple):
    """The hyperparameters of a step: as given, or their values in one update.

    Attributes:
      eta: learning rate.
      gamma: stiffness of the spring.
      decay: coefficient of the L2 penalty.
      beta: momentum.
      past: weight of the past in the mean.
    """

    eta: Any
    gamma: Any
    decay: Any
    beta: Any
    past: Any = 0.75  # A constant of the published programs.

    def at(self, step: jax.Array) -> "Numbers":
        """The values at `step`."""
        return Numbers(*(value_at(value, step) for value in self))


# An inner step of one array: from the point y, its momentum v, the gradient g at y, the centre w,
# the noise xi of this step and the numbers to the next y and v.
InnerStep = Callable[[Any, Any, Any, Any, Any, Numbers], tuple[Any, Any]]


def langevin_step(y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> tuple[Any, Any]:
    r""":math:`y - \eta \, [g + \lambda y + \gamma (y - w)] + \xi`, without momentum."""
    return y - now.eta * (decayed(g, y, now.decay) + now.gamma * (y - w)) + xi, v


def momentum_step(
    y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers, damp: Any = 0.0
) -> tuple[Any, Any]:
    """Nesterov's momentum (damped as PyTorch's) filters gradient and decay alone."""
    d = -now.eta * decayed(g, y, now.decay)
    v = now.beta * v + (1 - damp) * d
    return y + d + now.beta * v - now.eta * now.gamma * (y - w) + xi, v


def follow(mean: Any, y: Any, past: Any) -> Any:
    r""":math:`a \mu + (1 - a) y`."""
    return (past * mean + (1 - past) * y).astype(mean.dtype)


def unit_of_gamma(value: Any, away: optax.Updates) -> jax.Array:
    """The stiffness at which the spring, as far as it is stretched, weighs as the loss does."""
    return tree_math.ratio_or_zero(value, 0.5 * tree_math.vdot(away, away))


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


@registry.method("stage", needs=("grad_fn",))
def local_entropy(
    num_steps: int,
    gamma: optax.ScalarOrSchedule,
    *,
    inner_learning_rate: optax.ScalarOrSchedule = 0.1,
    noise: optax.ScalarOrSchedule | optax.GradientTransformation = 1e-4,
    momentum: optax.ScalarOrSchedule = 0.0,
    averaging: optax.ScalarOrSchedule = 0.75,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    scale_by_gamma: bool = False,
    initial_gradient: bool = True,
    automatic: int | None = None,
    inner_step: InnerStep | None = None,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient of the loss by that of the local entropy; the parameters never move.

    .. math:: y \leftarrow y - \eta [\nabla L(y) + \gamma (y - w)] + \sqrt{2 \eta T} \xi, \;
      \mu \leftarrow a \mu + (1 - a) y, \; g \leftarrow [\gamma] (w - \mu)

    Args:
      num_steps: inner steps L >= 0 from y = w; 0 passes the gradient on. Static.
      gamma, inner_learning_rate, weight_decay: stiffness, :math:`\eta`, L2 coefficient, each >= 0.
      noise: root of T, >= 0; or a transformation that adds the noise to a tree of zeros.
      momentum, averaging: Nesterov's in the loop, and a: in [0, 1).
      scale_by_gamma, initial_gradient: whether to emit :math:`\gamma (w - \mu)`, and to use the
        incoming gradient in the first inner step. Static.
      automatic: first updates that measure gamma's unit, from `value=loss`. Static.
      inner_step, key: another step of the loop (see its page); as for `langevin`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.local_entropy(2, 0.1, noise=0.0, scale_by_gamma=True), jnp.array([10.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda y, i: y)[0])
      [0.066]

    Cost: L - 1 extra gradients, L without `initial_gradient`; 0 copies (+2 or 3 temporary).
    """
    checks.check_count("num_steps", num_steps, 0)
    checks.check_count("automatic", automatic, 1)
    numbers = Numbers(inner_learning_rate, gamma, weight_decay, momentum, averaging)
    _check_ranges(numbers)
    if inner_step is None:
        inner_step = langevin_step if checks.is_number(momentum, 0) else momentum_step
    draw = _noise(noise, inner_learning_rate, key)
    loop = _Loop(inner_step, draw, num_steps, first=1 if initial_gradient and num_steps else 0)

    def init_fn(params: optax.Params) -> LocalEntropyState:
        one = jnp.ones([], jnp.result_type(float))
        return LocalEntropyState(jnp.zeros([], jnp.int32), one, draw.init(params))

    def update_fn(
        updates: Any, state: LocalEntropyState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, LocalEntropyState]:
        checks.require_params("local_entropy", params)
        now, unit = numbers.at(state.step), state.unit
        pull = now.gamma * unit
        if automatic is not None:
            _require_value(extra_args.get("value"))
            measures = state.step < automatic
            pull = jnp.where(measures, 0, pull)
        extra_args["step"] = state.step
        away, noise_state = _explore(
            loop, now._replace(gamma=pull), updates, params, state.noise_state, extra_args
        )
        if automatic is not None:
            found = unit_of_gamma(extra_args["value"], away)
            unit = jnp.where(measures, found, unit).astype(unit.dtype)
        if num_steps:
            factor = now.gamma * unit if scale_by_gamma else 1
            updates = tree_math.cast_like(tree_math.scale(factor, away), updates)
        return updates, LocalEntropyState(optax.safe_increment(state.step), unit, noise_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Loop(NamedTuple):
    """What does not change from update to update.

    Attributes:
      step: of one array.
      draw: adds the noise of a step to zeros.
      num_steps: how many steps.
      first: the first step that evaluates a gradient: 1 if the incoming one serves the one before.
    """

    step: InnerStep
    draw: optax.GradientTransformationExtraArgs
    num_steps: int
    first: int


def _explore(
    loop: _Loop, now: Numbers, updates: Any, params: Any, noise_state: Any, extra_args: Any
) -> tuple[optax.Updates, optax.OptState]:
    """How far the mean of the loop lies behind the weights, and the new state of the noise."""
    extra_args = dict(extra_args)
    grad_fn = extra_args.pop("grad_fn", None)
    extra_args.pop("value", None)
    start = means.copy(params)
    still = optax.tree.zeros_like(start)

    def descend(number: Any, grads: optax.Updates, carry: Any) -> Any:
        y, mu, v, noise_state = carry
        xi, noise_state = loop.draw.update(still, noise_state, y, **extra_args, inner_step=number)
        return *_advance(loop.step, y, mu, v, grads, params, xi, now), noise_state

    carry = (start, start, _no_momentum_yet(loop.step, start), noise_state)
    if loop.first:
        carry = descend(jnp.zeros([], jnp.int32), updates, carry)
    if loop.num_steps > loop.first:
        gradient = checks.require_grad_fn("local_entropy", grad_fn, params)

        def body(number: Any, carry: Any) -> Any:
            grads = gradient(tree_math.cast_like(carry[0], params), number - loop.first)
            return descend(number, grads, carry)

        carry = jax.lax.fori_loop(loop.first, loop.num_steps, body, carry)
    away = tree_math.on_inexact(jax.jit(lambda _, w, mu: w - mu), still, start, carry[1])
    return away, carry[3]


def _check_ranges(numbers: Numbers) -> None:
    rates = {"inner_learning_rate": numbers.eta, "gamma": numbers.gamma}
    for name, rate in (rates | {"weight_decay": numbers.decay}).items():
        checks.check_number(name, rate, low=0.0)
    for name, share in {"momentum": numbers.beta, "averaging": numbers.past}.items():
        checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)


def _require_value(value: Any) -> None:
    if value is None:
        raise ValueError(
            "flatopt.local_entropy(automatic=...) measures gamma in units of the loss. Call "
            "`tx.update(grads, opt_state, params, value=loss, grad_fn=grad_fn)`."
        )


def _noise(noise: Any, learning_rate: Any, key: rng.KeyLike) -> Any:
    """The transformation that adds the noise of an inner step."""
    if isinstance(noise, optax.GradientTransformation):
        return checks.as_transformation("noise", noise)
    checks.check_number("noise", noise, low=0.0)
    temperature = (lambda step: noise(step) ** 2) if callable(noise) else noise**2
    return thermal_noise(learning_rate, temperature, key)


def _no_momentum_yet(step: InnerStep, start: optax.Params) -> optax.Params:
    """Zeros like the weights, or one number where the step keeps no momentum."""
    if step is langevin_step:
        return jnp.zeros([])
    return optax.tree.zeros_like(start)


def _advance(
    step: InnerStep, y: Any, mu: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers
) -> tuple[Any, Any, Any]:
    """The new point, mean and momentum, leaf by leaf, in their dtypes."""

    @jax.jit  # Traced once for all leaves of a shape.
    def leaf(y: Any, mu: Any, v: Any, g: Any, w: Any, xi: Any) -> tuple[Any, Any, Any]:
        if not tree_math.is_inexact(y):
            return y, mu, v
        new_y, new_v = step(y, v, g, w, xi, now)
        new_y = new_y.astype(y.dtype)
        return new_y, follow(mu, new_y, now.past), new_v.astype(v.dtype)

    ys, structure = jax.tree.flatten(y)
    # A step without momentum has one number for all leaves: XLA takes long over wide loops.
    vs = jax.tree.leaves(v) if step is not langevin_step else len(ys) * [v]
    rest = map(jax.tree.leaves, (mu, g, w, xi))
    triples = [leaf(y, mu, v, g, w, xi) for y, v, mu, g, w, xi in zip(ys, vs, *rest, strict=True)]
    y, mu, new_v = (jax.tree.unflatten(structure, [x[i] for x in triples]) for i in range(3))
    return y, mu, v if step is langevin_step else new_v
