"""Lookahead (Zhang et al., arXiv:1907.08610): slow weights, to which fast ones come back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, momenta, registry, tree_math
from flatopt._core.timing import Every, value_at


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      step: int32 scalar, number of updates so far.
      inner_state: state of the wrapped optimiser, which moves the fast weights.
      slow: tree like the parameters, the slow weights, in the accumulator's dtype.
      slow_state: with `pull_back`, the momenta at the last synchronisation, in a tree like
        `inner_state`; else `optax.EmptyState()`.
    """

    step: jax.Array
    inner_state: optax.OptState
    slow: optax.Params
    slow_state: optax.OptState

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the slow weights in the dtypes of `params`."""
        return means.evaluated(self.slow, params)


def synchronise(slow: optax.Params, fast: optax.Params, alpha: Any) -> optax.Params:
    r"""Where slow and fast weights meet, :math:`s + \alpha (w - s)`, in the dtypes of `slow`."""
    return means.towards(slow, fast, alpha)


@registry.method("wrapper")
def lookahead(
    optimizer: optax.GradientTransformation,
    *,
    every: int | None = None,
    slow_step_size: optax.ScalarOrSchedule = 0.5,
    reset_state: bool = False,
    pull_back: bool = False,
    start: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lookahead: k fast steps forward, one step back towards where they began.

    .. math:: s \leftarrow s + \alpha \, (w_t - s), \qquad w_t \leftarrow s

    Args:
      optimizer: any optax transformation; it moves the fast weights w, which are the parameters.
      every: k, fast steps between two synchronisations, >= 1; None is 5. Static.
      slow_step_size: :math:`\alpha`, in [0, 1]: a number, a traced array, or a schedule.
      reset_state: whether the inner momenta then start anew; its schedules go on. Static.
      pull_back: whether the momenta are synchronised as the weights are. Static.
      start, accumulator_dtype: see `swa`; until `start - every` the slow weights are the fast ones.

    Returns:
      A wrapper to be outermost; needs `params`. Evaluate at `eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.lookahead(optax.sgd(1.0), every=1, slow_step_size=0.25)
      >>> print(tx.update(jnp.array(-1.0), tx.init(jnp.array(0.0)), jnp.array(0.0))[0])
      0.25

    References:
      Zhang, Lucas, Hinton, Ba. Lookahead Optimizer: k steps forward, 1 step back. arXiv:1907.08610

    Cost: 0 extra gradients; 1 copy, with `pull_back` the inner state once more.
    """
    checks.check_number("slow_step_size", slow_step_size, low=0.0, high=1.0)
    _check_momenta(reset_state, pull_back)
    optimizer = checks.as_transformation("optimizer", optimizer)
    when = Every.after_update(start, 5 if every is None else every)

    def init_fn(params: optax.Params) -> LookaheadState:
        state, slow = optimizer.init(params), means.copy(params, accumulator_dtype)
        before = optimizer.init(params) if pull_back else optax.EmptyState()
        return LookaheadState(jnp.zeros([], jnp.int32), state, slow, before)

    def update_fn(
        updates: Any, state: LookaheadState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, LookaheadState]:
        checks.require_params("lookahead", params)
        step, alpha = optax.safe_increment(state.step), value_at(slow_step_size, state.step)
        moves, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        fast, slow, slow_state = optax.apply_updates(params, moves), state.slow, state.slow_state
        if when.begin > 0:  # Until then the slow weights are the fast ones.
            slow = optax.tree.where(step <= when.begin, tree_math.cast_like(fast, slow), slow)
        due = when.is_due(step)
        moves, landed = _land(due, slow, fast, alpha, params, moves)
        slow = optax.tree.where(due, tree_math.cast_like(landed, slow), slow)
        if pull_back:
            inner_state, slow_state = _pull_back(due, inner_state, slow_state, alpha, params)
        if reset_state:
            inner_state = momenta.reset_if(due, inner_state, optimizer.init, slow, params)
        return moves, LookaheadState(step, inner_state, slow, slow_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _land(
    due: jax.Array, slow: Any, fast: Any, alpha: Any, params: Any, moves: Any
) -> tuple[optax.Updates, optax.Params]:
    """The moves that lead to where the weights meet, if it is `due`, and where they lead."""
    if checks.is_number(alpha, 1):  # Adding 0 would still change how XLA rounds.
        return moves, fast
    target = synchronise(slow, fast, alpha)
    # Chosen entry by entry: a branch would keep these passes from being one with the optimiser's.
    moves = optax.tree.where(due, means.moves(target, params, moves), moves)
    # Where the parameters land, not `target`: the two are one, and XLA takes one pass less.
    return moves, means.landed(target, params, moves)


def _pull_back(
    due: jax.Array, fast: optax.OptState, slow: optax.OptState, alpha: Any, params: Any
) -> tuple[optax.OptState, optax.OptState]:
    """The momenta meet as the weights do, if it is `due`."""

    def meet(carry: tuple[optax.OptState, optax.OptState]) -> tuple[Any, Any]:
        met = momenta.towards(*carry, 1 - alpha, params)
        return met, met

    return tree_math.apply_if(due, meet, (fast, slow))


def _check_momenta(reset_state: Any, pull_back: Any) -> None:
    if reset_state and pull_back:
        raise ValueError(
            "reset_state=True and pull_back=True exclude each other: the momenta either start anew "
            "or go on from between the old and the new ones."
        )
