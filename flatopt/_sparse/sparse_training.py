"""RigL (Evci et al., arXiv:1911.11134) and SET (Mocanu et al., arXiv:1707.04780): sparse training.

A network that is sparse from its first step to its last. Now and then the smallest weights of each
layer are dropped, and as many others grow: those of the largest gradients, or random ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, momenta, quantile, registry, rng, tree_math
from flatopt._core.timing import LAST, Every, value_at
from flatopt._sparse.densities import draw_mask, sparsities_by

ORDERS = ("instead", "before", "after")


class SparseTrainingState(NamedTuple):
    """State of `sparse_training`.

    Attributes:
      step: int32 scalar, number of updates so far.
      key: uint32 key data.
      mask: tree of bools like the parameters, True where a weight is alive; `optax.MaskedNode` for
        dense leaves.
      inner_state: state of the wrapped optimiser.
    """

    step: jax.Array
    key: jax.Array
    mask: Any
    inner_state: optax.OptState

    @property
    def eval_params_is_projection(self) -> bool:
        """It cuts what others hold to its mask: the average behind it, say."""
        return True

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns `params` with zeros where no weight is alive."""
        return keep_alive(self.mask, params)


def number_to_drop(alive: jax.Array, fraction: Any) -> jax.Array:
    r""":math:`\lfloor \alpha n \rfloor` of n weights, in float32 as in the authors' program."""
    number = alive.astype(jnp.float32) * jnp.asarray(fraction, jnp.float32)
    return jnp.clip(number.astype(jnp.int32), 0, alive)


def drop_and_grow(mask: jax.Array, weights: Any, scores: Any, fraction: Any) -> jax.Array:
    """The mask without its smallest weights, and with as many of the largest scores elsewhere.

    What has just been dropped may grow again. Of equal weights and of equal scores the first ones
    are taken.
    """
    alive = jnp.sum(mask, dtype=jnp.int32)
    number = number_to_drop(alive, fraction)
    kept = quantile.largest_in_tree(_sizes(mask, weights), alive - number)
    return kept | quantile.largest_in_tree(_sizes(~kept, scores), number)


def keep_alive(mask: Any, tree: Any) -> Any:
    """`tree` with zeros where the mask is off; what is not finite there becomes NaN, and shows."""
    # Not `x * m`: XLA makes a choice of it, which hides NaN.
    return _map(lambda m, x: jnp.where(m, x, 0 * x), mask, tree)


def stay_on(mask: Any, params: optax.Params, updates: optax.Updates) -> optax.Updates:
    """The updates that lead from `params` to weights that are zero where the mask is off."""
    wide = tree_math.widened(updates, params)
    return _map(lambda m, w, u: u * jnp.where(m, 1, 0) - jnp.where(m, 0, w), mask, params, wide)


@registry.method("wrapper")
def sparse_training(
    optimizer: optax.GradientTransformation,
    sparsity: float | None,
    *,
    distribution: Any = "erk",
    grow: str | None = "gradient",
    start: int | None = None,
    every: int | None = None,
    stop: int | None = None,
    fraction: optax.ScalarOrSchedule = 0.3,
    order: str = "instead",
    mask: Any = None,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network; its smallest weights give way to others: RigL, SET, a static mask.

    .. math:: m \leftarrow \text{top}_{n-k} |w| \cup \text{top}_k |g|, \; k = \alpha_t n

    Args:
      optimizer: any optax transformation; momenta of new weights start anew.
      sparsity, mask, distribution: see `erk_sparsities`; or "uniform", or a tree of sparsities.
      grow: what comes: "gradient" (RigL), "random" (SET), None (nothing ever changes). Static.
      start, every, stop: of the changes, in updates made; None: `every`, 100, no end. Static.
      fraction: :math:`\alpha_t`, share that is dropped, in [0, 1]: a number, or a schedule.
      order: a change comes "instead" of, "before" or "after" the optimiser's step. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A wrapper; needs `params`. Start from, and evaluate at, `eval_params(opt_state, params)`.

    Examples:
      >>> import jax, optax, flatopt
      >>> print(flatopt.sparse_training(optax.sgd(0.1), 0.75).init(jax.numpy.eye(4)).mask.sum())
      4

    References:
      Evci et al. Rigging the Lottery. arXiv:1911.11134. Mocanu et al. arXiv:1707.04780

    Cost: 0 extra gradients, 1 at a change with order="after"; 0.25 copies (+3 temporary).
    """
    checks.check_number("fraction", fraction, low=0.0, high=1.0)
    checks.check_choice("order", order, ORDERS)
    if grow is not None:
        checks.check_choice("grow", grow, ("gradient", "random"))
    checks.check_count("stop", stop, 0)
    optimizer = checks.as_transformation("optimizer", optimizer)
    sparsities_of, stream = sparsities_by(sparsity, distribution, mask), rng.Stream(key)
    when = _when(order, start, 100 if every is None else every)
    last = LAST if stop is None else min(stop, LAST)
    change = _Change(grow, when, last, fraction, stream, optimizer.init)

    def init_fn(params: optax.Params) -> SparseTrainingState:
        left, use = stream.split(stream.init())
        alive = draw_mask(use, params, sparsities_of(params))
        return SparseTrainingState(jnp.zeros([], jnp.int32), left, alive, optimizer.init(params))

    def update_fn(
        updates: Any,
        state: SparseTrainingState,
        params: Any = None,
        *,
        grow_scores: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparseTrainingState]:
        checks.require_params("sparse_training", params)
        step, alive, inner, left = state.step, state.mask, state.inner_state, state.key
        score_fn = _score_fn(grow, order, grow_scores, updates, extra_args.get("grad_fn"), params)
        if order != "after":
            alive, inner, left = change.run(step, (alive, inner, left), params, score_fn)
        take = functools.partial(_step, optimizer, alive, params, extra_args)
        if order == "instead" and grow is not None:
            due = change.is_due(step)
            wide = tree_math.widened(updates, params)
            moves, stepped = tree_math.apply_if(~due, take, (wide, inner))
            # Zero times the gradient, if it stands there still: what is not finite in it shows.
            moves = tree_math.scale(jnp.where(due, 0, 1), moves)
        else:
            moves, stepped = take((updates, inner))
        carry, step = (alive, stepped, left), optax.safe_increment(step)
        moves = stay_on(alive, params, moves)
        if order == "after":
            moves, carry = change.run_after(step, moves, carry, params, score_fn)
        alive, stepped, left = carry
        return moves, SparseTrainingState(step, left, alive, stepped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Change:
    """When the mask changes, and how."""

    grow: str | None
    when: Every
    last: int
    fraction: optax.ScalarOrSchedule
    stream: rng.Stream
    init: Callable[[Any], optax.OptState]

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the mask changes when `step` updates have been made."""
        return self.when.is_due(step) & (step <= self.last)

    def run(self, step: jax.Array, carry: Any, params: Any, score_fn: Any) -> Any:
        """`carry`, which is mask, state of the optimiser, and key, changed if that is due."""
        if self.grow is None:
            return carry
        turn = functools.partial(self._apply, step, params, score_fn)
        return tree_math.apply_if(self.is_due(step), turn, carry)

    def run_after(
        self, step: jax.Array, moves: Any, carry: Any, params: Any, score_fn: Any
    ) -> tuple[optax.Updates, Any]:
        """The same where `moves` lead, and the moves that lead to weights in the new mask."""

        def turn(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            # The moves are carried: of what is not, XLA would take the gradient in every step.
            moves, rest = carry
            rest = self._apply(step, means.reached(params, moves), score_fn, rest)
            return stay_on(rest[0], params, moves), rest

        if self.grow is None:
            return moves, carry
        return tree_math.apply_if(self.is_due(step), turn, (moves, carry))

    def _apply(self, step: Any, params: Any, score_fn: Any, carry: tuple[Any, ...]) -> Any:
        mask, inner, key = carry
        key, use = self.stream.split(key)
        scores = score_fn(params) if score_fn else rng.uniform_like(use, mask)
        fraction = value_at(self.fraction, step)
        new = _map(lambda m, w, s, _: drop_and_grow(m, w, s, fraction), mask, params, scores, mask)
        grown = jax.tree.map(lambda m, old: m & ~old, new, mask)
        return new, momenta.reset_entries(inner, self.init(params), grown, params), key


def _step(
    optimizer: Any, mask: Any, params: Any, extra_args: dict[str, Any], carry: tuple[Any, Any]
) -> tuple[optax.Updates, optax.OptState]:
    """The optimiser's step, which sees the gradients of living weights alone."""
    updates, state = carry
    grad_fn = extra_args.get("grad_fn")
    if callable(grad_fn):
        extra_args = extra_args | {"grad_fn": lambda p, i: keep_alive(mask, grad_fn(p, i))}
    return optimizer.update(keep_alive(mask, updates), state, params, **extra_args)


def _score_fn(
    grow: str | None, order: str, scores: Any, updates: Any, grad_fn: Any, params: Any
) -> Callable[[Any], Any] | None:
    """The function from where the mask changes to the scores of growth; None for random ones."""
    if scores is not None:
        return lambda _: scores
    if grow != "gradient":
        return None
    if order != "after":
        return lambda _: updates
    checked = checks.require_grad_fn("sparse_training", grad_fn, params)
    return lambda point: checked(point, 0)


def _when(order: str, start: int | None, every: int) -> Every:
    if order == "after":
        return Every.after_update(start, every)
    checks.check_count("every", every, 1)
    return Every.before_update(every if start is None else start, every)


def _map(function: Callable[..., Any], mask: Any, *trees: Any) -> Any:
    """`function(mask, *leaves)` where there is a mask; the leaf of the last tree elsewhere."""

    def leaf(m: Any, *leaves: Any) -> Any:
        return leaves[-1] if tree_math.is_masked(m) else function(m, *leaves)

    return jax.tree.map(leaf, mask, *trees, is_leaf=tree_math.is_masked)


def _sizes(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Absolute values in the mask; NaN, which is never taken, elsewhere, and inf where it is in."""
    # The mask comes first: what does not depend on it XLA would compute in every step, loop or not.
    size = jnp.abs(jnp.where(mask, x, 0))
    return jnp.where(mask, jnp.where(jnp.isnan(size), jnp.inf, size), jnp.nan)
