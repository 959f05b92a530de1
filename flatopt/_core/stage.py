"""What the factories share: the transformation around a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means
from flatopt._core.timing import Every, in_use, nonnegative_at, value_at


class StepState(NamedTuple):
    """State of a perturbation or a combiner: what its schedules count, and what they gave.

    Attributes:
      step: int32 scalar, number of calls so far.
      in_use: by name, the values of the last call, before the first those of step 0; of what is
        handed in as an array, `optax.inject_hyperparams` for one, whoever does so keeps the value.
    """

    step: jax.Array
    in_use: dict[str, jax.Array]


def _start(hyperparameters: dict[str, Any], at: Callable[[Any, Any], Any]) -> optax.TransformInitFn:
    """The state before the first call."""

    def init_fn(params: optax.Params) -> StepState:
        del params
        step = jnp.zeros([], jnp.int32)
        values = {name: at(value, step) for name, value in hyperparameters.items()}
        return StepState(step, in_use(hyperparameters, values, step))

    return init_fn


def perturbation(
    displace: Callable[..., optax.Updates],
    needs_params: str | None = None,
    **hyperparameters: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """The perturbation `displace(grads, **hyperparameters)`, or `displace(grads, params, ...)`.

    Schedules follow `step=`, the number of the update, if a stage passes it, else the number of
    calls; negative values of a schedule count as 0. `needs_params` is the name of the factory.
    """

    def update_fn(
        updates: optax.Updates,
        state: StepState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StepState]:
        del extra_args
        step = state.step if step is None else step
        values = {name: nonnegative_at(value, step) for name, value in hyperparameters.items()}
        if needs_params is None:
            displacement = displace(updates, **values)
        else:
            checks.require_params(needs_params, params)
            displacement = displace(updates, params, **values)
        told = in_use(hyperparameters, values, state.step)
        return displacement, StepState(optax.safe_increment(state.step), told)

    return optax.GradientTransformationExtraArgs(_start(hyperparameters, nonnegative_at), update_fn)


def combiner(
    name: str, combine: Callable[..., optax.Updates], **hyperparameters: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The combiner `combine(perturbed, clean, **hyperparameters)`, made by the factory `name`."""

    def update_fn(
        updates: optax.Updates,
        state: StepState,
        params: optax.Params | None = None,
        *,
        clean_updates: optax.Updates | None = None,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StepState]:
        del params, extra_args
        if clean_updates is None:
            raise ValueError(
                f"flatopt.{name} needs the clean gradient beside the perturbed one. Use it as "
                f"`flatopt.gradient_at(perturbation, combiner=flatopt.{name}(...))`."
            )
        step = state.step if step is None else step
        values = {name: value_at(value, step) for name, value in hyperparameters.items()}
        combined = combine(updates, clean_updates, **values)
        told = in_use(hyperparameters, values, state.step)
        return combined, StepState(optax.safe_increment(state.step), told)

    return optax.GradientTransformationExtraArgs(_start(hyperparameters, value_at), update_fn)


def observer(
    name: str, init: Callable[[optax.Params], Any], collect: Callable[[Any, Any], Any], when: Every
) -> optax.GradientTransformationExtraArgs:
    """A stage that hands updates on and, when due, takes the new weights into its state.

    `init(params)` makes a state with a field `step`; `collect(state, params)` returns it with the
    new weights taken in. Both leave `step` alone: here it counts the updates.
    """

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        checks.require_params(name, params)
        step = optax.safe_increment(state.step)

        def take_in(state: Any) -> Any:
            return collect(state, means.reached(params, updates))

        state = when.run(step, take_in, state)
        return updates, state._replace(step=step)

    return optax.GradientTransformationExtraArgs(init, update_fn)


def needs_params(
    name: str, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which says in the name of the factory `name` when the parameters are missing."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        checks.require_params(name, params)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def repeat(times: int | None, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`body(i, carry)` for i = 0, 1, ... `times` - 1; None is once."""
    if times in (None, 1):
        return body(jnp.zeros([], jnp.int32), carry)
    # A loop, not unrolled: the model is traced and compiled once.
    return jax.lax.fori_loop(0, times, body, carry)


def off_when_zero(
    rho: optax.ScalarOrSchedule, stage: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`stage`; where rho is the number 0, a stage of the same state that does nothing."""
    if not checks.is_number(rho, 0):
        return stage
    untouched = optax.with_extra_args_support(optax.identity())
    return optax.GradientTransformationExtraArgs(stage.init, untouched.update)
