"""Parle (Chaudhari et al., arXiv:1707.00424): coupled replicas that descend on local entropy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, tree_math
from flatopt._core.timing import Every, value_at
from flatopt._replicas.replicas import (
    AxisName,
    agreed,
    along_replicas,
    barycentre,
    own_axis,
)


class ParleState(NamedTuple):
    """State of `parle`; with a leading replica axis each entry has it too.

    Attributes:
      step: int32 scalar, number of updates so far.
      anchor: tree like the parameters: where the replica stood at the last synchronisation.
      mean: running mean of the replica's points, in float32 at least.
      inner_trace: momentum of the inner steps.
      outer_trace: momentum of the synchronisations.
    """

    step: jax.Array
    anchor: optax.Params
    mean: optax.Params
    inner_trace: optax.Updates
    outer_trace: optax.Updates


def inner_direction(grads: Any, y: optax.Params, x: optax.Params, gamma: Any) -> optax.Updates:
    r"""The gradient and the spring to the anchor, :math:`d = \nabla L(y) + \gamma \, (y - x)`."""
    return tree_math.on_inexact(lambda g, y, x: g + gamma * (y - x), grads, y, x)


def outer_direction(
    x: optax.Params, z: optax.Params, centre: optax.Params, rho: Any
) -> optax.Updates:
    r"""The pull at a synchronisation, :math:`D = (x - z) + \rho \, (x - \bar z)`."""
    return tree_math.on_inexact(lambda x, z, mean: (x - z) + rho * (x - mean), x, z, centre)


def add_to_momentum(v: optax.Updates, d: optax.Updates, beta: Any) -> optax.Updates:
    r"""The momentum :math:`v \leftarrow \beta v + d`."""
    return tree_math.on_inexact(lambda v, d: beta * v + d, v, d)


def descend(y: optax.Params, d: optax.Updates, v: optax.Updates, eta: Any) -> optax.Params:
    r"""A step with Nesterov's momentum, :math:`y \leftarrow y - \eta \, (d + v)`."""
    return tree_math.on_inexact(lambda y, d, v: y - eta * (d + v), y, d, v)


def running_mean(z: optax.Params, y: optax.Params, a: Any) -> optax.Params:
    r"""The mean of the inner points, :math:`z \leftarrow a z + (1 - a) \, y`."""
    return tree_math.on_inexact(lambda z, y: a * z + (1 - a) * y, z, y)


@registry.method("optimizer")
def parle(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule,
    *,
    every: int | None = None,
    momentum: optax.ScalarOrSchedule = 0.9,
    averaging: optax.ScalarOrSchedule = 0.75,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Parle: Entropy-SGD in parallel, with an elastic pull to the barycentre.

    .. math:: y \leftarrow y - \eta (d + v), \; d = \nabla L_a(y) + \gamma (y - x_a), \quad
      x_a, y \leftarrow y - \eta (D + V), \; D = (x_a - z_a) + \rho (x_a - \bar z)

    Args:
      learning_rate: :math:`\eta` >= 0 of both: a number, a traced array, or a schedule.
      gamma, rho: strength >= 0 of the springs to the anchor x and to the barycentre: likewise.
      every: L >= 1, updates from one synchronisation, the second step, to the next; None is 25.
      momentum, averaging: weight of the past, in [0, 1), in v and V, and in the mean z of y.
      axis_name: as for `couple_replicas`. Static.

    Returns:
      A whole optimiser; `update` needs `params`. Evaluate at `barycentre(params)`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.parle(0.1, gamma=0.1, rho=0.5, every=1), jnp.array([[1.0], [3.0]])
      >>> print(tx.update(w, tx.init(w), w)[0].ravel())
      [-0.12 -0.74]

    References:
      Chaudhari et al. Parle: Parallelizing Stochastic Gradient Descent. arXiv:1707.00424

    Cost: 0 extra gradients; 4 copies; 1 mean over the replicas every L updates.
    """
    for name, rate in (("learning_rate", learning_rate), ("gamma", gamma), ("rho", rho)):
        checks.check_number(name, rate, low=0.0)
    for name, share in (("momentum", momentum), ("averaging", averaging)):
        checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)
    when, axes = Every.after_update(None, 25 if every is None else every), own_axis(axis_name)

    def update_one(
        updates: optax.Updates, state: ParleState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Updates, ParleState]:
        del extra_args
        step = optax.safe_increment(state.step)
        eta, beta = value_at(learning_rate, state.step), value_at(momentum, state.step)
        stiffness, past = value_at(gamma, state.step), value_at(averaging, state.step)
        direction = inner_direction(updates, params, state.anchor, stiffness)
        inner_trace = add_to_momentum(state.inner_trace, direction, beta)
        point = descend(params, direction, inner_trace, eta)
        mean = running_mean(state.mean, point, past)

        def synchronise(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            y, x, v = carry
            d = outer_direction(x, mean, barycentre(mean, axes), value_at(rho, state.step))
            v = add_to_momentum(v, d, beta)
            y = descend(y, d, v, eta)
            return y, y, v

        carry = (point, state.anchor, state.outer_trace)
        point, anchor, outer_trace = when.run(agreed(step, axes), synchronise, carry)
        return _moves(point, params, updates), ParleState(
            step, anchor, mean, inner_trace, outer_trace
        )

    return along_replicas("parle", _init_one, update_one, axis_name)


def _init_one(params: optax.Params) -> ParleState:
    return ParleState(
        step=jnp.zeros([], jnp.int32),
        anchor=jax.tree.map(jnp.copy, params),
        mean=means.copy(params),
        inner_trace=optax.tree.zeros_like(params),
        outer_trace=optax.tree.zeros_like(params),
    )


def _moves(y: optax.Params, params: optax.Params, updates: optax.Updates) -> optax.Updates:
    """The updates that take the parameters to y."""
    like = tree_math.widened(updates, params)
    return tree_math.on_inexact(lambda _, y, w: y - w, like, y, params)
