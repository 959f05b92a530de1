"""The momenta inside any optimiser's state, known by the names of their fields."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import means, tree_math

# The first moment of a step: what Momentum-SAM displaces along.
FIRST = ("trace", "mu")
# All memory of gradients in optax's states, by the names of its fields. An average of the weights,
# or a gradient that a stage keeps for its own ends, has other names and is none.
NAMES = frozenset(FIRST) | {"nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v_row", "v_col"}
NAMES |= {"m", "v", "n", "g", "m1", "m2", "exp_avg", "exp_avg_sq", "grad_sum_sq", "step_sizes"}
NAMES |= {"prev_updates", "previous_gradient", "diff_params_memory", "diff_updates_memory"}
NAMES |= {"weights_memory"}
# What belongs to a momentum beside it, and starts anew with it: counts that correct its bias, the
# loss averaged along with it, the point that a sum of gradients or a difference is measured from.
COMPANIONS = frozenset({"count", "t", "count_m2", "barf", "gamma", "s", "x0", "is_initial_step"})
COMPANIONS |= {"params", "updates"}
# Fields by which a state holds that of another optimiser: its other fields tune that optimiser.
WRAPS = frozenset({"base_optimizer_state"})


def reset(state: optax.OptState, fresh: optax.OptState, params: Any) -> optax.OptState:
    """`state` with its momenta as in `fresh`, a state just made for `params`; schedules go on.

    The count beside a momentum belongs to it and starts anew too: Adam's corrects the bias of its
    momenta. Counts in other states stay, as those of learning-rate schedules, and hyperparameters.
    """

    def renew(name: str, own: Any, other: Any) -> Any:
        return other if name in COMPANIONS or _is_momentum(name) else own

    return _walk(state, fresh, renew, _types_in(params))


def reset_entries(
    state: optax.OptState, fresh: optax.OptState, entries: Any, params: Any
) -> optax.OptState:
    """`state` with its momenta as in `fresh` at the `entries`; all else goes on, counts too.

    `entries` is a tree like `params` of bools, with `optax.MaskedNode` for leaves left alone. What
    is kept by rows and columns, or of another shape for other reasons, has no such entries.
    """
    chosen = dict(jax.tree_util.tree_leaves_with_path(entries))

    def renew(path: Any, own: jax.Array, other: jax.Array) -> jax.Array:
        # A momentum stands where its parameter does, or below, as one of several.
        above = (path[:n] for n in range(len(path), -1, -1))
        here = next((chosen[p] for p in above if p in chosen), None)
        if here is None or own.ndim < here.ndim or own.shape[own.ndim - here.ndim :] != here.shape:
            return own
        return jnp.where(here, other, own).astype(own.dtype)

    def field(name: str, own: Any, others: Any) -> Any:
        if not _is_momentum(name):
            return own
        return jax.tree_util.tree_map_with_path(renew, own, others)

    return _walk(state, fresh, field, _types_in(params))


def reset_if(
    due: jax.Array, state: Any, init: Callable[[Any], Any], point: Any, params: optax.Params
) -> Any:
    """`state` with its momenta as `init` makes them at `point`, if it is `due`.

    The fresh state is made where it is needed, so that no zeros are kept elsewhere.
    """

    def start_anew(own: Any) -> Any:
        return reset(own, init(tree_math.cast_like(point, params)), params)

    return tree_math.apply_if(due, start_anew, state)


def towards(
    state: optax.OptState, other: optax.OptState, share: Any, params: Any
) -> optax.OptState:
    """`state` for `params` with its momenta moved by `share` of the way to those of `other`."""

    def move(name: str, own: Any, others: Any) -> Any:
        return means.towards(own, others, share) if _is_momentum(name) else own

    return _walk(state, other, move, _types_in(params))


def find_first(state: optax.OptState, like: Any, asked_by: str) -> Any:
    """The one first moment in `state`, as a tree like `like`; masked where a leaf has none.

    Raises `ValueError` in the name of the factory `asked_by` where there is none or several.
    """
    traces: list[Any] = []
    searched: list[str] = []
    _collect(state, traces, searched, _types_in(like))
    if jax.tree.leaves(like):  # What holds no array is no momentum.
        traces = [t for t in traces if tree_math.leaves_and_masks(t)]
    whole = [t for t in traces if not any(map(tree_math.is_masked, tree_math.leaves_and_masks(t)))]
    if not traces:
        names = ", ".join(dict.fromkeys(searched)) or "an empty state"
        raise ValueError(
            f"flatopt.{asked_by} found no momentum in the state of `optimizer`: it looked for "
            f"`trace`, `mu` or `ema` in {names}. Use an optimiser with momentum, such as "
            "optax.sgd(learning_rate, momentum=0.9) or optax.adam."
        )
    if len(whole) > 1 or (whole and len(traces) > 1):
        raise ValueError(
            f"flatopt.{asked_by} found {len(traces)} momentum buffers in the state of `optimizer` "
            f"and cannot choose: {', '.join(dict.fromkeys(searched))}. Use an optimiser with one."
        )
    found = tree_math.merge_masked(traces, like)
    _require_shapes_of(like, found, asked_by)
    return found


def _require_shapes_of(like: Any, found: Any, asked_by: str) -> None:
    """Raises unless every momentum has the shape of its leaf."""

    def differs(x: Any, momentum: Any) -> bool:
        return not tree_math.is_masked(momentum) and jnp.shape(momentum) != jnp.shape(x)

    if any(jax.tree.leaves(jax.tree.map(differs, like, found))):
        raise ValueError(
            f"flatopt.{asked_by} found momenta of other shapes than the parameters, as of several "
            f"replicas: {jax.tree.map(jnp.shape, found)}. Put it inside the wrapper that holds "
            f"them, such as flatopt.replicated_sgd(flatopt.{asked_by}(...), ...)."
        )


def _is_momentum(name: str) -> bool:
    return name in NAMES or name == "ema"


def _holds_momentum(state: Any) -> bool:
    """Whether a named tuple is the state of a step with momentum."""
    names = set(getattr(state, "_fields", ()))
    return isinstance(state, optax.EmaState) or bool(names & NAMES and not names & WRAPS)


def _types_in(params: Any) -> frozenset[type]:
    """Named tuples that the parameters are made of: a field `mu` there is no momentum."""
    if isinstance(params, dict):
        parts = list(params.values())
    else:
        parts = list(params) if isinstance(params, tuple | list) else []
    own = {type(params)} if hasattr(params, "_fields") else set()
    return frozenset(own).union(*map(_types_in, parts))


def _walk(
    state: Any, other: Any, change: Callable[[str, Any, Any], Any], skip: frozenset[type]
) -> Any:
    """`state` with `change(name, own, others)` for each field of a state that holds a momentum."""
    if isinstance(state, dict):
        return type(state)({k: _walk(v, other[k], change, skip) for k, v in state.items()})
    if not isinstance(state, tuple | list) or type(state) in skip:
        return state
    names = getattr(state, "_fields", None)
    if names is None:
        pairs = zip(state, other, strict=True)
        return type(state)([_walk(own, others, change, skip) for own, others in pairs])
    holds = _holds_momentum(state)

    def field(name: str, own: Any, others: Any) -> Any:
        changed = change(name, own, others) if holds else own
        return _walk(own, others, change, skip) if changed is own else changed

    fields = zip(names, state, other, strict=True)
    return type(state)(*(field(*entry) for entry in fields))


def _collect(
    state: Any, traces: list[Any], searched: list[str], skip: frozenset[type] = frozenset()
) -> None:
    """Appends the first moments below `state` to `traces`, and the states' names to `searched`."""
    if type(state) in skip:
        return
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        searched.append(type(state).__name__)
        for name in (*FIRST, *(["ema"] if isinstance(state, optax.EmaState) else [])):
            if name in state._fields:
                traces.append(getattr(state, name))
                return
    children = state.values() if isinstance(state, dict) else state
    if isinstance(children, tuple | list) or isinstance(state, dict):
        for child in children:
            _collect(child, traces, searched, skip)
