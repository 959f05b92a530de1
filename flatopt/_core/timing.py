"""When a method acts, and what its schedules say then."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math

LAST = jnp.iinfo(jnp.int32).max  # Where the counters of updates stop.


def value_at(value: optax.ScalarOrSchedule, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The number `value`, or the value of the schedule `value` at `step`."""
    return value(step) if callable(value) else value


def nonnegative_at(
    value: optax.ScalarOrSchedule, step: jax.typing.ArrayLike
) -> jax.typing.ArrayLike:
    """`value_at`; a schedule that dips below zero gives zero."""
    return jnp.maximum(value(step), 0.0) if callable(value) else value


def in_use(
    hyperparameters: dict[str, Any], values: dict[str, Any], step: Any
) -> dict[str, jax.Array]:
    """Of the `values` in use at `step`, by name, those that a state keeps for its readers.

    An array, unlike a number or a schedule, is kept by who hands it in, as
    `optax.inject_hyperparams` does under the same name: twice it could not be found by it.
    """
    return {
        # Like the step, which every state counts: mapped over replicas on a mesh, a constant would
        # lie in another way than its successors, and be compiled for once more.
        name: jnp.full_like(step, values[name], float)
        for name, given in hyperparameters.items()
        if callable(given) or isinstance(given, (int, float))
    }


@dataclasses.dataclass(frozen=True)
class Every:
    """When a method acts: with `start`, `start + every`, ... updates made.

    Make one by `before_update` or `after_update`: they check the arguments and set what None means.

    Attributes:
      start: number of updates made when the method first acts.
      every: its period from there on.
      always: whether it acts in every update, so that nothing has to be decided.
    """

    start: int
    every: int
    always: bool

    @classmethod
    def before_update(cls, start: int | None, every: int | None) -> "Every":
        """For what takes gradients elsewhere: None is 0, so that the first update is one."""
        start, every = _checked(start, every)
        return cls(start, every, always=start == 0 and every == 1)

    @classmethod
    def after_update(cls, start: int | None, every: int | None) -> "Every":
        """For what looks at new weights: None and 0 are the end of the first period."""
        start, every = _checked(start, every)
        start = start or every
        return cls(start, every, always=start == every == 1)

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the method acts when `step` updates have been made."""
        if self.start > LAST:
            return jnp.zeros([], bool)
        if self.every == 1:
            return step >= self.start
        if self.every > LAST:
            return step == self.start
        # A counter that has stopped tells nothing about the period.
        return (step >= self.start) & ((step - self.start) % self.every == 0) & (step < LAST)

    @property
    def begin(self) -> int:
        """Number of updates made when the first period begins; it ends when the method acts."""
        return min(self.start - self.every, LAST)

    def turns_before(self, step: jax.Array) -> jax.Array:
        """How often the method has acted before, if it acts when `step` updates have been made."""
        return (step - min(self.start, LAST)) // min(self.every, LAST)

    def latest(self, step: jax.Array) -> jax.Array:
        """Number of updates made when the method acted last, itself if it acts at `step`."""
        if self.every > LAST:
            return jnp.full_like(step, min(self.start, LAST))
        return step - (step - self.start) % self.every

    def run(self, step: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
        """`function(carry)`, which must look like `carry`, if it is due; else `carry`."""
        if self.always:
            return function(carry)
        return tree_math.apply_if(self.is_due(step), function, carry)

    def branch(self, step: jax.Array, function: Callable[[Any], Any], carry: Any) -> Any:
        """`run` for work on what its loop would not change: out of a loop XLA takes all of that.

        Then it is done in every update, due or not. A branch keeps it, and copies `carry`.
        """
        if self.always:
            return function(carry)
        carry = jax.tree.map(jnp.asarray, carry)
        return jax.lax.cond(
            self.is_due(step), lambda c: tree_math.cast_like(function(c), c), lambda c: c, carry
        )


def _checked(start: int | None, every: int | None) -> tuple[int, int]:
    checks.check_count("start", start, 0)
    checks.check_count("every", every, 1)
    return start or 0, every or 1
