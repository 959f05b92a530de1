"""Argument checks: each error names the argument, its value, the allowed range and the mend."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from flatopt._core import tree_math

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CALL = "grad_fn = flatopt.make_grad_fn(loss_fn, batch)"


def check_number(
    name: str,
    value: optax.ScalarOrSchedule,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    high_allowed: bool = True,
) -> None:
    """Raises `ValueError` unless every entry of `value` is finite and in the range.

    Schedules and tracers pass unchecked, so that `optax.inject_hyperparams` and `jax.vmap` over a
    hyperparameter work.
    """
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, dtype=float)
    below = array <= high if high_allowed else array < high
    if not np.all(np.isfinite(array) & (array >= low) & below):
        bracket = "]" if high_allowed and math.isfinite(high) else ")"
        raise ValueError(
            f"{name}={value!r} is out of range: it must be a finite number in "
            f"{'(' if math.isinf(low) else '['}{low:g}, {high:g}{bracket}, or a schedule of the "
            "step count."
        )


def check_count(name: str, value: int | None, low: int) -> None:
    """Raises unless `value` is None or a Python integer of at least `low`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name}={value!r} must be a Python int of at least {low}: it shapes the program and "
            "cannot be traced (under inject_hyperparams, name it in static_args)."
        )
    if value < low:
        raise ValueError(f"{name}={value} is out of range: it must be at least {low}.")


def is_number(value: optax.ScalarOrSchedule, number: float) -> bool:
    """Whether `value` is known to be `number` now: not a schedule, not a traced array."""
    is_known = not callable(value) and not isinstance(value, jax.core.Tracer)
    return is_known and bool(np.all(value == number))


def require_params(name: str, params: Any) -> None:
    """Raises unless the caller handed over the parameters."""
    if params is None:
        raise ValueError(
            f"flatopt.{name} needs the parameters. Call "
            "`tx.update(grads, opt_state, params, ...)` with `params` as third argument."
        )


def require_grad_fn(name: str, grad_fn: _Function | None, params: Any) -> _Function:
    """Returns `grad_fn`; raises unless the caller handed it over, and all of the parameters."""
    require_params(name, params)
    if grad_fn is None:
        raise ValueError(
            f"flatopt.{name} takes gradients away from the parameters and needs `grad_fn`. Add\n"
            f"    {_CALL}\n"
            "    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)\n"
            "In a loop that cannot pass a function, use flatopt.alternate or flatopt.msam."
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn={grad_fn!r} must be callable: grad_fn(params, i). Use `{_CALL}`.")
    require_whole_tree(name, params)
    return grad_fn


def require_whole_tree(name: str, params: Any) -> None:
    """Raises when `optax.masked` or `optax.partition` has cut leaves out of `params`."""
    leaves = jax.tree.leaves(params, is_leaf=tree_math.is_masked)
    if any(tree_math.is_masked(leaf) for leaf in leaves):
        raise ValueError(
            f"flatopt.{name} stands inside optax.masked or optax.partition and sees only a part "
            "of the parameters, but `grad_fn` needs them all. Put it outside and mask the "
            "perturbation instead: `flatopt.gradient_at(optax.chain(flatopt.scale_to_norm(rho), "
            "flatopt.mask_displacement(mask)))` perturbs the chosen leaves only."
        )
