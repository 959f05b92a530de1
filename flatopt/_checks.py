"""Argument checks: each error names the argument, its value, the allowed range and the mend."""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import _tree

_CALL = "grad_fn = flatopt.make_grad_fn(loss_fn, batch)"


class GradientFunction(Protocol):
    """What `grad_fn` must be: a callable from parameters to gradients.

    The second argument numbers the extra evaluations inside one `update`, from 0. Use it to pick a
    minibatch or to fold it into a random key; ignore it to evaluate everything on one batch. The
    result is the gradient alone, already averaged over devices as the training loop wants it.
    """

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike, /) -> optax.Updates:
        """Returns the gradient at `params` for extra evaluation number `i`."""
        ...


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


def is_zero(value: optax.ScalarOrSchedule) -> bool:
    """Whether `value` is a number known to be zero now: not a schedule, not a traced array."""
    return (
        not callable(value) and not isinstance(value, jax.core.Tracer) and bool(np.all(value == 0))
    )


def as_key(key: jax.typing.ArrayLike) -> jax.Array:
    """A typed random key from a typed or raw key or an integer seed."""
    array = jnp.asarray(key)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.integer):
        return jax.random.key(array)
    if array.dtype == jnp.uint32 and array.ndim == 1:
        return jax.random.wrap_key_data(array)
    raise ValueError(
        f"key={key!r} must be an integer seed, jax.random.key(seed), or raw key data (uint32)."
    )


def require_params(name: str, params: Any) -> None:
    """Raises unless the caller handed over the parameters."""
    if params is None:
        raise ValueError(
            f"flatopt.{name} needs the parameters. Call "
            "`tx.update(grads, opt_state, params, ...)` with `params` as third argument."
        )


def require_grad_fn(name: str, grad_fn: GradientFunction | None) -> GradientFunction:
    """Returns `grad_fn`; raises unless the caller handed one over."""
    if grad_fn is None:
        raise ValueError(
            f"flatopt.{name} takes gradients away from the parameters and needs `grad_fn`. Add\n"
            f"    {_CALL}\n"
            "    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)\n"
            "In a loop that cannot pass a function, use flatopt.msam, which needs none."
        )
    if not callable(grad_fn):
        raise TypeError(f"grad_fn={grad_fn!r} must be callable: grad_fn(params, i). Use `{_CALL}`.")
    return grad_fn


def require_whole_tree(name: str, params: Any) -> None:
    """Raises when `optax.masked` or `optax.partition` has cut leaves out of `params`."""
    leaves = jax.tree.leaves(params, is_leaf=_tree.is_masked)
    if any(_tree.is_masked(leaf) for leaf in leaves):
        raise ValueError(
            f"flatopt.{name} stands inside optax.masked or optax.partition and sees only a part "
            "of the parameters, but `grad_fn` needs them all. Put it outside and mask the "
            "perturbation instead: `flatopt.gradient_at(optax.chain(flatopt.scale_to_norm(rho), "
            "flatopt.mask_displacement(mask)))` perturbs the chosen leaves only."
        )
