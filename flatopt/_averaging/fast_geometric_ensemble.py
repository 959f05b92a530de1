"""Fast geometric ensembles (Garipov et al., arXiv:1802.10026): a model at each low of the rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.snapshots import snapshot_params, snapshots
from flatopt._core import checks
from flatopt._core.grad_fn import make_grad_fn


def cyclic_triangle_schedule(max_value: float, min_value: float, *, period: int) -> optax.Schedule:
    r"""A learning rate that falls and rises linearly, period after period: that of FGE.

    .. math:: \eta_t = \eta_1 + (\eta_2 - \eta_1) \, (1 - |1 - 2 x|), \qquad
      x = (t \bmod period) / period

    Args:
      max_value: :math:`\eta_1`, the rate at the ends of a period, >= 0.
      min_value: :math:`\eta_2`, the rate in its middle, >= 0.
      period: number of updates in a period, >= 2. Static.

    Returns:
      A schedule: a function from the step count, from 0 on, to the learning rate. The models are
      those of `snapshots(number, start=period // 2, every=period)`.

    Examples:
      >>> import flatopt
      >>> schedule = flatopt.cyclic_triangle_schedule(0.05, 0.01, period=4)
      >>> print([round(float(schedule(t)), 4) for t in range(6)])
      [0.05, 0.03, 0.01, 0.03, 0.05, 0.03]

    References:
      As for `fast_geometric_ensemble`.

    Cost: 0 extra gradients; 0 copies.
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

    .. math:: \theta_i = w_t, \qquad t = (i + \tfrac12) \, period, \quad i = 0, 1, \dots

    Args:
      loss_fn: scalar loss, called as `loss_fn(params, *batch)`.
      params: where to start: the weights of a run that is four fifths or so done.
      batches: the arguments of `loss_fn` after the parameters; the steps in front of every array.
      period, max_learning_rate, min_learning_rate: of a cycle; see `cyclic_triangle_schedule`.
      make_optimizer: from the schedule to an optimiser; None: SGD with momentum 0.9. Static.

    Returns:
      The models, one a cycle, stacked along a new first axis of every leaf.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stack = flatopt.fast_geometric_ensemble(lambda w, x: (w - x) ** 2, jnp.array(0.0),
      ...     (jnp.arange(8.0),), period=4, max_learning_rate=0.2, min_learning_rate=0.1)
      >>> print(stack.shape)
      (2,)

    References:
      Garipov et al. Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs. arXiv:1802.10026

    Cost: 1 gradient a step; a copy for each model; all batches lie in memory at once.
    """
    schedule = cyclic_triangle_schedule(max_learning_rate, min_learning_rate, period=period)
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

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stack = jnp.array([1.0, 2.0, 6.0])
      >>> print(flatopt.ensemble_predict(lambda w, x: w * x, stack, 10.0, number=2))
      15.0

    References:
      As for `fast_geometric_ensemble`.

    Cost: 0 extra gradients; the memory of all models' predictions together.
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
