"""The local entropy (Chaudhari et al., arXiv:1611.01838): a Langevin loop around the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import value_at
from flatopt._entropy.langevin import thermal_noise


class Numbers(NamedTuple):
    """The hyperparameters of a step: as given, or their values in one update.

    Attributes:
      eta: learning rate.
      gamma: stiffness of the spring.
      decay: coefficient of the L2 penalty.
      beta: momentum.
    """

    eta: Any
    gamma: Any
    decay: Any
    beta: Any

    def at(self, step: jax.Array) -> "Numbers":
        """The values at `step`."""
        return Numbers(*(value_at(value, step) for value in self))


# An inner step of one array: from the point y, its momentum v, the gradient g at y, the centre w,
# the noise xi of this step and the numbers to the next y and v.
InnerStep = Callable[[Any, Any, Any, Any, Any, Numbers], tuple[Any, Any]]


def langevin_step(y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> tuple[Any, Any]:
    r""":math:`y - \eta \, [g + \lambda y + \gamma (y - w)] + \xi`, without momentum."""
    return y - now.eta * (g + now.decay * y + now.gamma * (y - w)) + xi, v


def momentum_step(y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> tuple[Any, Any]:
    """Nesterov's momentum filters gradient and decay; spring and noise stand beside it."""
    d = -now.eta * (g + now.decay * y)
    v = now.beta * v + d
    return y + d + now.beta * v - now.eta * now.gamma * (y - w) + xi, v


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

    .. math:: y \leftarrow y - \eta [\nabla L(y) + \gamma (y - w)] + \sqrt{2 \eta T} \xi, \quad
      \mu \leftarrow a \mu + (1 - a) y, \quad g \leftarrow [\gamma] (w - \mu)

    Args:
      num_steps: inner steps L >= 0 from y = w; 0 passes the gradient on. Static.
      gamma, inner_learning_rate, weight_decay: stiffness, :math:`\eta`, L2 coefficient, each >= 0.
      noise: root of T, >= 0; or a transformation that adds the noise to a tree of zeros.
      momentum, averaging: Nesterov's in the loop, and a: in [0, 1).
      scale_by_gamma: emit :math:`\gamma (w - \mu)`, not :math:`w - \mu`. Static.
      initial_gradient: take the incoming gradient for the first inner step. Static.
      automatic: first updates that measure a unit of gamma, from `value=loss`. Static.
      inner_step: another step of the loop; see the page on local entropy. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

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
    _check_ranges(gamma, inner_learning_rate, weight_decay, momentum, averaging)
    numbers = Numbers(inner_learning_rate, gamma, weight_decay, momentum)
    if inner_step is None:
        inner_step = langevin_step if checks.is_number(momentum, 0) else momentum_step
    draw = _noise(noise, inner_learning_rate, key)
    first = 1 if initial_gradient and num_steps else 0  # The first inner step that evaluates.

    def init_fn(params: optax.Params) -> LocalEntropyState:
        one = jnp.ones([], jnp.result_type(float))
        return LocalEntropyState(jnp.zeros([], jnp.int32), one, draw.init(params))

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
        _require_value(automatic, value)
        now = numbers.at(state.step)
        measures = False if automatic is None else state.step < automatic
        pull = now.gamma * state.unit
        pulled = now._replace(gamma=pull if measures is False else jnp.where(measures, 0, pull))
        extra_args["step"] = state.step

        def descend(number: Any, grads: optax.Updates, carry: Any) -> Any:
            y, mu, v, noise_state = carry
            still = optax.tree.zeros_like(y)
            xi, noise_state = draw.update(still, noise_state, y, **extra_args, inner_step=number)
            y, v = _step_tree(inner_step, y, v, grads, params, xi, pulled)
            return y, _follow(mu, y, value_at(averaging, state.step)), v, noise_state

        def body(number: Any, carry: Any) -> Any:
            point = optax.tree.cast_like(carry[0], params)
            return descend(number, gradient(point, number - first), carry)

        start = _wide(params)
        carry = (start, start, _momentum(inner_step, start), state.noise_state)
        if first:
            carry = descend(jnp.zeros([], jnp.int32), updates, carry)
        if num_steps > first:
            gradient = checks.require_grad_fn("local_entropy", grad_fn, params)
            carry = jax.lax.fori_loop(first, num_steps, body, carry)
        _, mu, _, noise_state = carry

        away, unit = optax.tree.sub(start, mu), state.unit
        if automatic is not None:
            unit = jnp.where(measures, unit_of_gamma(value, away), unit).astype(unit.dtype)
        if num_steps:
            factor = now.gamma * unit if scale_by_gamma else 1
            updates = optax.tree.cast_like(tree_math.scale(factor, away), updates)
        return updates, LocalEntropyState(optax.safe_increment(state.step), unit, noise_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_ranges(gamma: Any, learning_rate: Any, decay: Any, momentum: Any, past: Any) -> None:
    rates = {"gamma": gamma, "inner_learning_rate": learning_rate, "weight_decay": decay}
    for name, rate in rates.items():
        checks.check_number(name, rate, low=0.0)
    for name, share in {"momentum": momentum, "averaging": past}.items():
        checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)


def _require_value(automatic: int | None, value: Any) -> None:
    if automatic is not None and value is None:
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


def _wide(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda w: w.astype(tree_math.accumulator_dtype(w.dtype)), params)


def _momentum(inner_step: InnerStep, start: optax.Params) -> optax.Params:
    """Zeros like the weights, or one number a leaf where the step keeps no momentum."""
    if inner_step is langevin_step:
        return jax.tree.map(lambda w: jnp.zeros([], w.dtype), start)
    return optax.tree.zeros_like(start)


def _follow(mean: optax.Params, point: optax.Params, past: Any) -> optax.Params:
    r""":math:`a \mu + (1 - a) y`."""
    return jax.tree.map(lambda m, y: (past * m + (1 - past) * y).astype(m.dtype), mean, point)


def _step_tree(step: InnerStep, y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> Any:
    """The new y and v, leaf by leaf, in their dtypes."""

    def leaf(y: Any, v: Any, g: Any, w: Any, xi: Any) -> tuple[jax.Array, jax.Array]:
        new_y, new_v = step(y, v, g, w, xi, now)
        return new_y.astype(y.dtype), new_v.astype(v.dtype)

    trees = map(jax.tree.leaves, (y, v, g, w, xi))
    pairs = [leaf(*leaves) for leaves in zip(*trees, strict=True)]
    structure = jax.tree.structure(y)
    return tuple(jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1))


def exponential_scoping(
    init_value: float, rate: float, *, every: int | None = None, max_value: float | None = None
) -> optax.Schedule:
    r"""A stiffness that grows exponentially: Entropy-SGD's scoping, Parle's and rSGD's focusing.

    .. math:: \gamma_t = \min\{ \gamma_0 (1 + r)^{\lfloor t / k \rfloor}, \gamma_{max} \}

    Args:
      init_value: :math:`\gamma_0` >= 0, the value at step 0.
      rate: r >= 0, relative growth in one period; by a factor f in n periods: `f ** (1 / n) - 1`.
      every: k >= 1, steps in a period; None is 1. Static.
      max_value: :math:`\gamma_{max}` >= 0; None means no limit.

    Returns:
      A schedule: a function of the step count.

    Examples:
      >>> import flatopt
      >>> gamma = flatopt.exponential_scoping(0.5, rate=0.1, every=10)
      >>> print(gamma(0), gamma(9), gamma(20))
      0.5 0.5 0.605

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent Into Wide Valleys. arXiv:1611.01838

    Cost: 0 extra gradients; 0 copies.
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
