"""Parle: replicas that each descend on their local entropy, coupled every so many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math
from flatopt._core.timing import value_at
from flatopt._replicas.replicas import LEADING_AXIS, AxisName, barycentre, over_leading_axis


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


def parle(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule,
    *,
    every: int = 25,
    momentum: optax.ScalarOrSchedule = 0.9,
    averaging: optax.ScalarOrSchedule = 0.75,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Parle: Entropy-SGD in parallel, with an elastic pull to the barycentre.

    .. math::
      d = \nabla L_a(y) + \gamma \, (y - x_a), \quad v \leftarrow \beta v + d, \quad
      y \leftarrow y - \eta (d + v), \quad z_a \leftarrow a z_a + (1 - a) y

    in each update, and after every L-th

    .. math::
      D = (x_a - z_a) + \rho \, (x_a - \bar z), \quad V \leftarrow \beta V + D, \quad
      y \leftarrow y - \eta (D + V), \quad x_a \leftarrow y

    Args:
      learning_rate: :math:`\eta` >= 0 of both: a number, a traced array, or a schedule of the count
        of updates.
      gamma: stiffness >= 0 of the spring to the replica's own anchor: likewise; usually
        `exponential_scoping(0.01, 0.5 / batches, every=L, max_value=1.0)`.
      rho: strength >= 0 of the pull to the barycentre at a synchronisation: likewise. The authors'
        grows as gamma does, from 0.01 n L to at most 10.
      every: L >= 1, updates between two synchronisations. Static.
      momentum: :math:`\beta` of both, in [0, 1).
      averaging: a, in [0, 1), weight of the past in the running mean z.
      axis_name: None when updates and parameters have a leading replica axis; inside `jax.vmap` or
        `jax.shard_map`, the name of the axis that counts the replicas, or several. Static.

    Returns:
      A whole optimiser; `update` needs `params`. Evaluate at `barycentre(params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.parle(0.1, gamma=0.1, rho=0.5, every=5)
      >>> params = flatopt.replicate_params(jnp.array([1.0, -2.0]), 3, std=1.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(200):  # the loss of each replica is |w - 3|^2 / 2
      ...     updates, opt_state = tx.update(params - 3.0, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{flatopt.barycentre(params)[0]:.2f}")
      3.00

    References:
      Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar, Oberman. Parle: Parallelizing Stochastic
      Gradient Descent. arXiv:1707.00424

    Notes:
      This is the authors' program: at a synchronisation the replica goes on from its last inner
      point, not from the anchor as in the paper, and neither the running mean nor the momenta start
      anew. In a loop that knows of one model only, wrap it:
      `hold_replicas(parle(..., axis_name="replicas"), n)`. Gradient evaluations: none extra, one a
      replica and update; one mean over the replicas every L updates. State: four copies of the
      parameters and a counter.
    """
    for name, rate in (("learning_rate", learning_rate), ("gamma", gamma), ("rho", rho)):
        checks.check_number(name, rate, low=0.0)
    for name, share in (("momentum", momentum), ("averaging", averaging)):
        checks.check_number(name, share, low=0.0, high=1.0, high_allowed=False)
    checks.check_count("every", every, 1)
    axes = LEADING_AXIS if axis_name is None else axis_name

    def init_one(params: optax.Params) -> ParleState:
        return ParleState(
            step=jnp.zeros([], jnp.int32),
            anchor=jax.tree.map(jnp.copy, params),
            mean=jax.tree.map(lambda w: jnp.array(w, tree_math.accumulator_dtype(w.dtype)), params),
            inner_trace=optax.tree.zeros_like(params),
            outer_trace=optax.tree.zeros_like(params),
        )

    def update_one(
        updates: optax.Updates, state: ParleState, params: optax.Params
    ) -> tuple[optax.Updates, ParleState]:
        def now(hyperparameter: optax.ScalarOrSchedule) -> Any:
            return value_at(hyperparameter, state.step)

        rate, beta, past = now(learning_rate), now(momentum), now(averaging)

        def descend(point: Any, direction: Any, trace: Any) -> tuple[Any, Any]:
            trace = jax.tree.map(lambda v, d: (beta * v + d).astype(v.dtype), trace, direction)
            return jax.tree.map(
                lambda y, d, v: (y - rate * (d + v)).astype(y.dtype), point, direction, trace
            ), trace

        pulled = jax.tree.map(
            lambda g, y, x: (g + now(gamma) * (y - x)).astype(g.dtype),
            updates,
            params,
            state.anchor,
        )
        point, inner_trace = descend(params, pulled, state.inner_trace)
        mean = jax.tree.map(
            lambda z, y: (past * z + (1 - past) * y).astype(z.dtype), state.mean, point
        )
        step = optax.safe_increment(state.step)

        def synchronise(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            point, anchor, trace = carry
            direction = jax.tree.map(
                lambda x, z, m: ((x - z) + now(rho) * (x - m)).astype(x.dtype),
                anchor,
                mean,
                barycentre(mean, axes),
            )
            moved, trace = descend(point, direction, trace)
            return moved, moved, trace

        carry = (point, state.anchor, state.outer_trace)
        point, anchor, outer_trace = tree_math.apply_if(step % every == 0, synchronise, carry)
        moves = jax.tree.map(lambda y, w: (y - w).astype(w.dtype), point, params)
        return moves, ParleState(step, anchor, mean, inner_trace, outer_trace)

    def init_fn(params: optax.Params) -> ParleState:
        return init_one(params) if axis_name is not None else over_leading_axis(init_one)(params)

    def update_fn(
        updates: optax.Updates,
        state: ParleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ParleState]:
        del extra_args
        checks.require_params("parle", params)
        if axis_name is not None:
            return update_one(updates, state, params)
        return over_leading_axis(update_one)(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
