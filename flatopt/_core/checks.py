"""Argument checks: each error names the argument, its value, the allowed range and the mend."""

import inspect
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import optax

from flatopt._core import tree_math

_CALL = "grad_fn = flatopt.make_grad_fn(loss_fn, batch)"


def check_number(
    name: str,
    value: optax.ScalarOrSchedule,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_allowed: bool = True,
    high_allowed: bool = True,
    schedule_allowed: bool = True,
) -> None:
    """Raises unless every entry of `value` is a finite number in the range.

    Schedules and tracers pass unchecked, so that `optax.inject_hyperparams` and `jax.vmap` over a
    hyperparameter work.
    """
    if isinstance(value, jax.core.Tracer) or (callable(value) and schedule_allowed):
        return
    bracket = "]" if high_allowed and math.isfinite(high) else ")"
    opening = "[" if low_allowed and math.isfinite(low) else "("
    allowed = f"a finite number in {opening}{low:g}, {high:g}{bracket}"
    allowed += ", or a schedule of the step count" if schedule_allowed else ""
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array):
        hint = ""
        if isinstance(value, optax.GradientTransformation):
            hint = " This is a transformation: is the order of the arguments right?"
        elif callable(value):
            hint = " A schedule is not taken here."
        raise TypeError(f"{name}={value!r} must be {allowed}.{hint}")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}={value!r} must be {allowed}, not of type {array.dtype}.")
    array = array.astype(float)
    below = array <= high if high_allowed else array < high
    above = array >= low if low_allowed else array > low
    if not np.all(np.isfinite(array) & above & below):
        raise ValueError(f"{name}={value!r} is out of range: it must be {allowed}.")


def as_transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """`value` with support for extra arguments; raises unless it is a transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name}={value!r} must be an optax transformation, such as optax.sgd(0.1) for an "
            "optimiser or flatopt.scale_to_norm(0.05) for a perturbation."
        )
    return optax.with_extra_args_support(value)


def check_count(name: str, value: int | None, low: int, *, none_allowed: bool = True) -> None:
    """Raises unless `value` is None, where that is allowed, or an integer of at least `low`."""
    if value is None and none_allowed:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name}={value!r} must be a Python int of at least {low}: it shapes the program and "
            "cannot be traced (under inject_hyperparams, name it in static_args)."
        )
    if value < low:
        raise ValueError(f"{name}={value} is out of range: it must be at least {low}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}.")


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
    require_arrays("params", params)


def require_arrays(name: str, tree: Any) -> None:
    """Raises where a whole module, with its functions and flags, stands for its arrays."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {leaf!r:.80} and no array. Pass the arrays "
                "alone: of an Equinox module `eqx.filter(model, eqx.is_inexact_array)`; "
                "flatopt.equinox.make_grad_fn and flatopt.equinox.eval_params take it whole."
            )


def require_value(name: str, value: Any) -> Any:
    """Returns the loss; raises unless the caller handed it over."""
    if value is None:
        raise ValueError(
            f"flatopt.{name} needs the loss at the parameters. Write\n"
            "    loss, grads = jax.value_and_grad(loss_fn)(params, batch)\n"
            "    updates, opt_state = tx.update(grads, opt_state, params, value=loss)"
        )
    return value


def require_grad_fn(
    name: str, grad_fn: Callable[..., Any] | None, params: Any
) -> Callable[[Any, Any], Any]:
    """Returns `grad_fn`, its results checked; raises unless it came, and all of the parameters."""
    require_params(name, params)
    if grad_fn is None:
        raise ValueError(
            f"flatopt.{name} takes gradients away from the parameters and needs `grad_fn`. Add\n"
            f"    {_CALL}\n"
            "    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)\n"
            "In a loop that cannot pass a function, use flatopt.alternate or flatopt.msam. Flax's "
            "own TrainState does not pass it on: use flatopt.linen.TrainState."
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn={grad_fn!r} must be callable: grad_fn(params, i). Use `{_CALL}`.")
    require_whole_tree(name, params)
    _require_two_arguments(grad_fn, params)

    def checked(point: Any, i: Any) -> Any:
        grads = grad_fn(point, i)
        _check_gradient(grads, point)
        return grads

    return checked


def require_value_fn(name: str, grad_fn: Any) -> Callable[[Any], jax.Array]:
    """Returns `grad_fn.value`, the loss; raises unless there is one."""
    value = getattr(grad_fn, "value", None)
    if not callable(value):
        raise ValueError(
            f"flatopt.{name} compares losses, and grad_fn={grad_fn!r:.80} gives gradients alone. "
            f"Use `{_CALL}`, or give yours a method `value(params)` that returns the loss."
        )
    return value


def _require_two_arguments(grad_fn: Callable[..., Any], params: Any) -> None:
    """Raises unless `grad_fn(params, i)` can be called, as far as its signature tells."""
    try:
        inspect.signature(grad_fn).bind(params, 0)
    except ValueError:  # A callable without a signature.
        return
    except TypeError as error:
        raise TypeError(
            f"grad_fn={grad_fn!r} must take the parameters and the number of the evaluation, "
            f"`lambda params, i: ...`: {error}. Or use `{_CALL}`."
        ) from error


def _check_gradient(grads: Any, params: Any) -> None:
    """Raises unless `grads` is a tree like `params`; looks at shapes only, so it costs nothing."""
    same = bool(jax.tree.structure(grads) == jax.tree.structure(params))  # type: ignore[operator]
    if same and all(map(_same_shape, jax.tree.leaves(grads), jax.tree.leaves(params))):
        return
    what = "something else"
    if isinstance(grads, tuple) and len(grads) == 2 and not same:
        what = "a pair, such as (value, grads)"
    elif jax.tree_util.all_leaves([grads]) and np.ndim(grads) == 0:
        what = "a single number, such as the loss"
    raise TypeError(
        "grad_fn must return the gradient alone, a tree of the structure and shapes of `params`; "
        f"it returns {what}: {jax.tree.map(np.shape, grads)} for {jax.tree.map(np.shape, params)}. "
        f"Use `{_CALL}`."
    )


def _same_shape(x: Any, y: Any) -> bool:
    return np.shape(x) == np.shape(y)


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
