"""Wrappers whose parameters live at a displaced point, so that no extra gradient is needed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree


class HoldPerturbedState(NamedTuple):
    """State of `hold_perturbed`.

    Attributes:
      inner_state: state of the wrapped optimiser.
      perturbation_state: state of the perturbation.
      offset: tree like the parameters: parameters minus centre.
    """

    inner_state: optax.OptState
    perturbation_state: optax.OptState
    offset: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the centre, `params - offset`."""
        return _move(params, -1.0, _tree.merge_masked([self.offset], params))


def hold_perturbed(
    optimizer: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the parameters at a displaced point while `optimizer` moves the centre.

    .. math::
      w_t = c_t + \epsilon_t, \qquad c_{t+1} = c_t + u(\nabla L(w_t), c_t), \qquad
      \epsilon_{t+1} = \epsilon(\nabla L(w_t), c_{t+1})

    The training loop takes its one gradient where the parameters are: with random noise as
    perturbation this is training under weight noise, with `scale_to_norm` it is SAM whose ascent
    direction is one step old.

    Args:
      optimizer: any optax transformation; it is shown the centre as `params`.
      perturbation: transformation from a gradient to a displacement; it is given the new centre as
        `params`.

    Returns:
      A wrapper to be outermost. `update` needs `params`. The first step is unperturbed. Evaluate at
      the centre: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.hold_perturbed(optax.sgd(0.1), flatopt.scale_to_norm(0.5))
      >>> params = jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{params:.2f} {flatopt.eval_params(opt_state, params):.2f}")
      1.30 0.80

    Notes:
      Place: outermost; decay or clip inside for the centre, before it for the displaced point.
      Gradient evaluations: none extra. State: one copy of the parameters, the offset, besides the
      inner states. The centre is recovered as `params - offset`, so keep parameters in float32:
      in half precision each step rounds it. A NaN in the gradient enters the offset:
      `optax.apply_if_finite` around the whole skips the step.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> HoldPerturbedState:
        return HoldPerturbedState(
            inner_state=optimizer.init(params),
            perturbation_state=perturbation.init(params),
            offset=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: HoldPerturbedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HoldPerturbedState]:
        _checks.require_params("hold_perturbed", params)
        centre = state.eval_params(params)
        inner_updates, inner_state = optimizer.update(
            updates, state.inner_state, centre, **extra_args
        )
        new_centre = optax.apply_updates(centre, inner_updates)
        offset, perturbation_state = perturbation.update(
            updates, state.perturbation_state, new_centre, **extra_args
        )
        offset = optax.tree.cast_like(offset, state.offset)
        moves = jax.tree.map(
            lambda u, new, old: (u + (new - old)).astype(u.dtype),
            inner_updates,
            offset,
            state.offset,
        )
        return moves, HoldPerturbedState(inner_state, perturbation_state, offset)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class MsamState(NamedTuple):
    """State of `msam`.

    Attributes:
      step: int32 scalar, number of updates so far.
      scale: float scalar, rho / (|m| + 1e-12) at the last step: the parameters stand at the centre
        minus `scale` times the momentum that `inner_state` holds.
      inner_state: state of the wrapped optimiser.
    """

    step: jax.Array
    scale: jax.Array
    inner_state: optax.OptState

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the centre, `params + scale * momentum`."""
        return _move(params, self.scale, _momentum(self.inner_state, params))


def msam(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: sharpness-aware training without an extra gradient.

    .. math::
      w_t = c_t - \rho_{t-1} \, m_{t-1} / (\|m_{t-1}\| + 10^{-12}), \qquad
      c_{t+1} = c_t + u(\nabla L(w_t), c_t)

    The parameters live at :math:`w_t`, displaced from the centre :math:`c_t` along the coming
    update: by -rho in the direction of the momentum buffer m, with one global norm. The training
    loop takes its one gradient there; `optimizer` moves the centre.

    Args:
      optimizer: any optax transformation whose state holds a momentum (`optax.trace`: field
        `trace`; `optax.ema`: `ema`) or first-moment trace (Adam and its family, Lion: `mu`). It is
        found through `chain`, `inject_hyperparams`, `MultiSteps`, `masked`, `partition`; leaves
        without one are not displaced. The raw buffer is used: no bias correction, no
        preconditioner, no Nesterov look-ahead.
      rho: length of the displacement, in units of the parameters' Euclidean norm: a number, a
        traced array, or a schedule of the step count. A negative value is the ascent variant, which
        displaces against the coming update. With the number 0 this is `optimizer`, bit for bit; to
        switch off in mid-run use a schedule, which takes the last offset back.
      momentum: the decay of the momentum, in (0, 1], if `optimizer` adds the gradient to it as it
        comes, :math:`m_t = momentum \, m_{t-1} + g_t`, like `optax.sgd(learning_rate, momentum)`.
        The old momentum then is computed back from the new one, which saves a pass over memory: in
        a step that memory limits, most of what `msam` costs. None: any optimiser. Static.

    Returns:
      A wrapper to be outermost. Evaluate at the centre: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if `rho` is not finite, if `optimizer` has no momentum or several for one leaf, or
        if `momentum` is out of range or not how `optimizer` keeps it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.msam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> params = jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{params:.2f} {flatopt.eval_params(opt_state, params):.2f}")
      0.30 0.80

    References:
      Becker, Altrock, Risse. Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead. arXiv:2401.12033

    Notes:
      Place: outermost. Weight decay inside acts at the centre; chained before `msam` it acts at the
      displaced point, as in the authors' SGD code. Averages go inside:
      `msam(optax.chain(optimizer, swa()))` averages centres. The first step is unperturbed. The
      offset of a step is remembered with its own rho, so a schedule does not make the centre drift
      (the authors' SGD code removes the old offset with the new rho). Too large a rho diverges
      abruptly: raise it from 0.3 or so. Gradient evaluations: none extra. State: the inner state
      and two scalars. Keep parameters in float32: in half precision each step rounds the centre.
    """
    _checks.check_number("rho", rho)
    off = _checks.is_zero(rho)  # Adding zero would still change how XLA rounds.
    optimizer = optax.with_extra_args_support(optimizer)
    if momentum is not None:
        _require_plain_momentum(optimizer, momentum)

    def init_fn(params: optax.Params) -> MsamState:
        inner_state = optimizer.init(params)
        return MsamState(
            step=jnp.zeros([], jnp.int32),
            scale=jnp.zeros([], _tree.scalar_dtype(_momentum(inner_state, params))),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: MsamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MsamState]:
        centre = params if off or params is None else state.eval_params(params)
        inner_updates, inner_state = optimizer.update(
            updates, state.inner_state, centre, **extra_args
        )
        step = optax.safe_increment(state.step)
        if off:
            return inner_updates, MsamState(step, state.scale, inner_state)
        new = _momentum(inner_state, updates)
        if momentum is None:
            old = _momentum(state.inner_state, updates)
        else:  # The buffer is donated: to read it after the new one is written would take a copy.
            old = jax.tree.map(lambda m, g: (m - g) / momentum, new, updates)
        radius = rho(state.step) if callable(rho) else rho
        scale = (radius / (_tree.norm(new) + _tree.EPSILON)).astype(state.scale.dtype)

        def leaf(update: jax.Array, m_old: Any, m_new: Any) -> jax.Array:
            if _tree.is_masked(m_new):
                return update
            return (update + (state.scale * m_old - scale * m_new)).astype(update.dtype)

        moves = jax.tree.map(leaf, inner_updates, old, new)
        return moves, MsamState(step, scale, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _move(params: optax.Params, scale: jax.typing.ArrayLike, direction: Any) -> optax.Params:
    """`params + scale * direction`, in the dtypes of `params`; masked leaves stay."""

    def leaf(param: jax.Array, towards: Any) -> jax.Array:
        if _tree.is_masked(towards):
            return param
        return (param + scale * towards).astype(param.dtype)

    return jax.tree.map(leaf, params, direction)


def _require_plain_momentum(optimizer: Any, momentum: jax.typing.ArrayLike) -> None:
    """Tries `optimizer` on two gradients; a traced value passes unchecked."""
    _checks.check_number("momentum", momentum, low=0.0, high=1.0)
    if isinstance(momentum, jax.core.Tracer):
        return
    if _checks.is_zero(momentum):
        raise ValueError(f"momentum={momentum!r} must be above 0: it is divided by. Use None.")
    with jax.ensure_compile_time_eval():
        params, first, second = (jnp.array(x) for x in ([1.0, -2.0], [0.5, 0.25], [-1.0, 3.0]))
        _, state = optimizer.update(first, optimizer.init(params), params)
        old = _momentum(state, params)
        new = _momentum(optimizer.update(second, state, params)[1], params)
        plain = bool(jnp.allclose(new, momentum * old + second))
    if not plain:
        raise ValueError(
            f"momentum={momentum!r} is not how `optimizer` keeps its momentum: after the gradient "
            f"{second} it went from {old} to {new}. Give the decay of an optimiser such as "
            "optax.sgd(learning_rate, momentum), or None."
        )


def _momentum(state: optax.OptState, like: Any) -> Any:
    """The momentum buffer in `state`, as a tree like `like`; masked where a leaf has none."""
    traces: list[Any] = []
    searched: list[str] = []
    _collect_traces(state, traces, searched)
    whole = [t for t in traces if not any(map(_tree.is_masked, _leaves_and_masks(t)))]
    if not traces:
        names = ", ".join(dict.fromkeys(searched)) or "an empty state"
        raise ValueError(
            "flatopt.msam found no momentum in the state of `optimizer`: it looked for `trace`, "
            f"`mu` or `ema` in {names}. Use an optimiser with momentum, such as "
            "optax.sgd(learning_rate, momentum=0.9) or optax.adam."
        )
    if len(whole) > 1 or (whole and len(traces) > 1):
        raise ValueError(
            f"flatopt.msam found {len(traces)} momentum buffers in the state of `optimizer` and "
            f"cannot choose: {', '.join(dict.fromkeys(searched))}. Use an optimiser with one."
        )
    return _tree.merge_masked(traces, like)


def _collect_traces(state: Any, traces: list[Any], searched: list[str]) -> None:
    """Appends the momentum trees below `state` to `traces`, and the states' names to `searched`."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        searched.append(type(state).__name__)
        for name in ("trace", "mu", *(["ema"] if isinstance(state, optax.EmaState) else [])):
            if name in state._fields:
                traces.append(getattr(state, name))
                return
    children = state.values() if isinstance(state, dict) else state
    if isinstance(children, tuple | list) or isinstance(state, dict):
        for child in children:
            _collect_traces(child, traces, searched)


def _leaves_and_masks(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_tree.is_masked)
