"""Lookahead: slow weights that follow the fast ones, and to which the fast ones come back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, momenta, tree_math
from flatopt._core.timing import Every, value_at


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
      step: int32 scalar, number of updates so far.
      inner_state: state of the wrapped optimiser, which moves the fast weights.
      slow: tree like the parameters, the slow weights, in float32 at least.
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


def lookahead(
    optimizer: optax.GradientTransformation,
    *,
    every: int | None = None,
    slow_step_size: optax.ScalarOrSchedule = 0.5,
    reset_state: bool = False,
    pull_back: bool = False,
    start: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lookahead: k fast steps forward, one step back towards where they began.

    .. math::
      s \leftarrow s + \alpha \, (w_t - s), \qquad w_t \leftarrow s
      \qquad \text{after updates } t = k, 2k, \dots

    The parameters are the fast weights w, a plain tree; the slow weights s live in the state.

    Args:
      optimizer: any optax transformation; it moves the fast weights.
      every: k, fast steps between two synchronisations, >= 1; None means 5. Static.
      slow_step_size: :math:`\alpha`, in [0, 1]: a number, a traced array, or a schedule of the step
        count. With the number 1 the parameters move as under `optimizer` alone, bit for bit.
      reset_state: True: after each synchronisation the momenta in the inner state start anew, with
        the numbers beside them, such as Adam's count. Counts of schedules go on. False: the inner
        state is kept. Static.
      pull_back: True: the momenta are synchronised as the weights are, towards what they were after
        the last synchronisation (at first: towards their initial values, zero). Not together with
        `reset_state`. Static.
      start: number of updates after which the first synchronisation comes, >= 0; None and 0 are
        `every`. Until `start - every` the slow weights are the fast ones. Static.

    Returns:
      A wrapper to be outermost; extra arguments, `grad_fn` among them, reach `optimizer`. `update`
      needs `params`. Evaluate at the slow weights: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.lookahead(optax.sgd(1.0), every=2, slow_step_size=0.25)
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the fast weights: 1, 2 and back to 0.5, 1.5
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, flatopt.eval_params(opt_state, params))
      1.5 0.5

    References:
      Zhang, Lucas, Hinton, Ba. Lookahead Optimizer: k steps forward, 1 step back. arXiv:1907.08610

    Notes:
      Place: outermost; stages such as `sam`, clipping and decay go inside. Between two
      synchronisations the parameters are fast weights: checkpoint parameters and state together.
      An average of the slow weights is `optax.chain(lookahead(...), swa(every=k))`; take it with
      `opt_state[1].eval_params(params)`, since both parts offer evaluation weights. The authors'
      code for `pull_back` keeps no copy of the momentum, but the momentum itself, and so multiplies
      it by :math:`\alpha (2 - \alpha)` from the second synchronisation on; here it is a copy.
      Gradient evaluations: those of `optimizer`. State: that of `optimizer`, one copy of the
      parameters and one integer; with `pull_back` a second state of `optimizer`.
    """
    checks.check_number("slow_step_size", slow_step_size, low=0.0, high=1.0)
    if reset_state and pull_back:
        raise ValueError(
            "reset_state=True and pull_back=True exclude each other: the momenta either start anew "
            "or go on from between the old and the new ones."
        )
    optimizer = optax.with_extra_args_support(optimizer)
    # Adding zero would still change how XLA rounds.
    keeps_fast = checks.is_number(slow_step_size, 1)
    when = Every.after_update(start, every or 5)
    begin = when.start - when.every  # Where the first k fast steps start from.

    def init_fn(params: optax.Params) -> LookaheadState:
        return LookaheadState(
            step=jnp.zeros([], jnp.int32),
            inner_state=optimizer.init(params),
            slow=means.copy(params),
            slow_state=optimizer.init(params) if pull_back else optax.EmptyState(),
        )

    def update_fn(
        updates: optax.Updates,
        state: LookaheadState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookaheadState]:
        checks.require_params("lookahead", params)
        step = optax.safe_increment(state.step)
        fast_updates, inner_state = optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        fast = optax.apply_updates(params, fast_updates)
        share = value_at(slow_step_size, state.step)
        slow, slow_state = state.slow, state.slow_state
        if begin > 0:  # Until then the slow weights are the fast ones.
            slow = optax.tree.where(step <= begin, means.copy(fast), slow)
        # A branch would keep these passes from being one with those of the inner optimiser.
        due = when.is_due(step)
        if keeps_fast:
            moves, synchronised = fast_updates, means.copy(fast)
        else:
            target = means.towards(slow, fast, share)
            moves = optax.tree.where(due, means.moves(target, params, fast_updates), fast_updates)
            # Where the parameters land, not `target`: the two are one, and XLA takes one pass less.
            synchronised = means.landed(target, params, moves)
        slow = optax.tree.where(due, synchronised, slow)

        def pull(carry: tuple[optax.OptState, optax.OptState]) -> tuple[Any, Any]:
            inner_state, slow_state = carry
            pulled = momenta.towards(inner_state, slow_state, 1 - share)
            return pulled, pulled

        def reset(inner_state: optax.OptState) -> optax.OptState:
            return momenta.reset(inner_state, optimizer.init(fast))

        if pull_back:
            inner_state, slow_state = tree_math.apply_if(due, pull, (inner_state, slow_state))
        if reset_state:
            inner_state = tree_math.apply_if(due, reset, inner_state)
        return moves, LookaheadState(step, inner_state, slow, slow_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
