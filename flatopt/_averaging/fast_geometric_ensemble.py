"""Schedules of radii and learning rates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.snapshots import snapshot_params, snapshots
from flatopt._core import checks
from flatopt._core.grad_fn import make_grad_fn


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
    checks.check_number("max_value", max_value, low=0.0)
    checks.check_number("min_value", min_value, low=0.0)
    checks.check_count("period", period, 2)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        x = (jnp.asarray(count) % period) / period
        return max_value + (min_value - max_value) * (1 - jnp.abs(1 - 2 * x))

    return schedule


def fast_geometric_ensemble(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: tuple[Any, ...],
    *,
    period: int,
    max_learning_rate: float,
    min_learning_rate: float,
    make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
) -> optax.Params:
    r"""Walks on from trained weights with a cyclic rate, and keeps a model at each low point.

    .. math::
      \theta_i = w_t, \qquad t = (i + \tfrac12) \, period, \quad i = 0, 1, \dots

    Args:
      loss_fn: scalar loss, called as `loss_fn(params, *batch)`.
      params: where to start: the weights of a run that is four fifths or so done.
      batches: the arguments of `loss_fn` after the parameters, with one more axis in front of every
        array: the steps.
      period: number of updates in a cycle, >= 2; two to four epochs, say. Static.
      max_learning_rate: the rate at the ends of a cycle.
      min_learning_rate: the rate in its middle, a fifth to a hundredth of the highest.
      make_optimizer: function from the schedule to any optax transformation. None: SGD with
        momentum 0.9. Static.

    Returns:
      The models, stacked along a new first axis of every leaf: one for each half cycle that
      ends, `(steps + period - period // 2) // period` of them. For `ensemble_predict`,
      `merge_params`, `greedy_soup`.

    Raises:
      ValueError: if an argument is out of range, or there are fewer steps than half a cycle.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> def loss_fn(w, x):
      ...     return jnp.mean((w - x) ** 2)
      >>> batches = (jnp.arange(8.0)[:, None],)  # 8 steps, batches of 1
      >>> stack = flatopt.fast_geometric_ensemble(loss_fn, jnp.array(0.0), batches, period=4,
      ...     max_learning_rate=0.2, min_learning_rate=0.1)
      >>> print(stack.shape)
      (2,)

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Notes:
      One `lax.scan`, so all batches lie in memory at once, and it may be jitted or vmapped over
      replicas. For a loop of your own, chain `snapshots(number, start=period // 2, every=period)`
      after an optimiser with `cyclic_triangle_schedule`. Gradient evaluations: one a step, and what
      the optimiser asks for besides. BatchNorm statistics have to be recomputed for each model.
    """
    schedule = cyclic_triangle_schedule(max_learning_rate, min_learning_rate, period)
    lengths = {x.shape[0] for x in jax.tree.leaves(batches)}
    if len(lengths) != 1:
        raise ValueError(
            f"batches must have one common number of steps in front; found {sorted(lengths)}."
        )
    steps = lengths.pop()
    number = (steps + period - period // 2) // period
    if number < 1:
        raise ValueError(
            f"batches holds {steps} steps: period={period} needs at least {period // 2}, half a "
            "cycle, for its first model."
        )
    optimizer = (make_optimizer or (lambda s: optax.sgd(s, momentum=0.9)))(schedule)
    tx = optax.chain(optimizer, snapshots(number, start=period // 2, every=period))

    def step(carry: tuple[Any, Any], batch: tuple[Any, ...]) -> tuple[tuple[Any, Any], None]:
        params, opt_state = carry
        grad_fn = make_grad_fn(loss_fn, *batch)
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), None

    (_, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return snapshot_params(opt_state)[0]


def ensemble_predict(
    predict_fn: Callable[..., Any],
    stack: optax.Params,
    *args: Any,
    number: jax.typing.ArrayLike | None = None,
) -> Any:
    r"""The mean of what several models predict, computed by `jax.vmap`.

    .. math:: \bar p(x) = \frac1m \sum_{i=1}^{m} p(x; \theta_i)

    Args:
      predict_fn: function from parameters and `args` to an array or a tree of them. Let it return
        probabilities: the mean of logits is another ensemble.
      stack: parameters stacked along their first axis: `snapshot_params`, or samples of SWAG.
      *args: the inputs, the same for every model.
      number: how many models, from the first on, count: what `snapshot_params` returns beside the
        stack; may be traced. None: all.

    Returns:
      The mean prediction.

    Raises:
      ValueError: if `stack` is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> stack = jnp.array([1.0, 2.0, 6.0])
      >>> print(flatopt.ensemble_predict(lambda w, x: w * x, stack, 10.0))
      30.0
      >>> print(flatopt.ensemble_predict(lambda w, x: w * x, stack, 10.0, number=2))
      15.0

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Notes:
      All models run at once: memory is theirs together. Costs no gradient.
    """
    length = next((leaf.shape[0] for leaf in jax.tree.leaves(stack)), 0)
    if length == 0:
        raise ValueError("stack is empty: it must hold at least one tree of parameters.")
    predictions = jax.vmap(predict_fn, in_axes=(0, *[None] * len(args)))(stack, *args)
    if number is None:
        return jax.tree.map(lambda p: jnp.mean(p, axis=0), predictions)
    if not isinstance(number, jax.core.Tracer):
        checks.check_number("number", number, low=1.0, high=float(length))
    counts = jnp.arange(length) < number

    def mean(prediction: jax.Array) -> jax.Array:
        # `where`: an empty slot may predict NaN.
        counted = counts.reshape(-1, *[1] * (prediction.ndim - 1))
        return jnp.sum(jnp.where(counted, prediction, 0), axis=0) / number

    return jax.tree.map(mean, predictions)
