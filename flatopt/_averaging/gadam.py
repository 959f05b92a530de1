"""Gadam and GadamX: Adam, or its partially adaptive sibling, with averaged weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.swa import swa
from flatopt._core import checks, stage


class PadamState(NamedTuple):
    """State of the partially adaptive step of `gadamx`.

    Attributes:
      step: int32 scalar, number of updates so far.
      mu: tree like the parameters, decaying mean of the gradients.
      nu: tree like the parameters, decaying mean of their squares.
      nu_max: tree like the parameters, the largest value that each entry of `nu` has had.
    """

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def gadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW, evaluated at the equal-weight mean of its weights.

    .. math::
      w_{t+1} = (1 - \eta \lambda) w_t - \eta \, \hat m_t / (\sqrt{\hat v_t} + \epsilon), \qquad
      \bar w = \text{mean of } w_t, \; t = start, start + every, \dots

    Args:
      learning_rate: :math:`\eta`: a number, a traced array, or a schedule of the step count. It
        should stay high while the weights are averaged: the authors halve it.
      b1: decay of the mean gradient, in [0, 1).
      b2: decay of the mean squared gradient, in [0, 1).
      eps: :math:`\epsilon`, > 0.
      weight_decay: :math:`\lambda`, >= 0, decoupled: a number, a traced array, or a schedule. The
        authors find large ones best, from 0.1 to 0.3.
      start: number of the first update, counted from 1, whose weights enter the mean; see `swa`.
        Static.
      every: one in `every` updates from there on; the authors average at the end of each epoch.
        Static.

    Returns:
      A whole optimiser; `update` needs `params`. Get the mean with
      `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.gadam(0.1, weight_decay=0.0)
      >>> params = jnp.array(1.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.3f} {flatopt.eval_params(opt_state, params):.3f}")
      0.800 0.850

    References:
      Granziol, Wan, Albanie, Roberts. Iterative Averaging in the Quest for Best Test Error.
      arXiv:2003.01247

    Notes:
      The same as `optax.chain(optax.adamw(...), swa(start, every))`. Gradient evaluations: none
      extra. State: two copies of the parameters for Adam, one for the mean.
    """
    _check(learning_rate, b1, b2, eps, weight_decay)
    tx = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        swa(start=start, every=every),
    )
    return stage.needs_params("gadam", tx)


def gadamx(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    partial: float = 0.125,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Partially adaptive Adam, evaluated at the equal-weight mean of its weights.

    .. math::
      w_{t+1} = (1 - \eta \lambda) w_t
      - \eta \, \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \, m_t \big/ (\sqrt{\bar v_t} + \epsilon)^{2p},
      \qquad \bar v_t = \max(\bar v_{t-1}, v_t)

    Args:
      learning_rate: :math:`\eta`: a number, a traced array, or a schedule of the step count. With a
        small p it is of the order of SGD's; the authors halve it where the average begins.
      b1: decay of the mean gradient, in [0, 1).
      b2: decay of the mean squared gradient, in [0, 1).
      eps: :math:`\epsilon`, > 0. Unlike in `optax.adam`, it is added before bias correction.
      partial: p, in [0, 1/2]: 1/2 is AMSGrad, 0 is SGD with momentum (and a bias correction).
      weight_decay: :math:`\lambda`, >= 0, decoupled: a number, a traced array, or a schedule.
      start: as for `gadam`. Static.
      every: as for `gadam`. Static.

    Returns:
      A whole optimiser; `update` needs `params`. Get the mean with
      `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.gadamx(0.1, weight_decay=0.0)
      >>> params = jnp.array(1.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.3f} {flatopt.eval_params(opt_state, params):.3f}")
      0.983 0.988

    References:
      Granziol, Wan, Albanie, Roberts. Iterative Averaging in the Quest for Best Test Error.
      arXiv:2003.01247. The step: Chen, Zhou, Tang, Yang, Cao, Gu. Closing the Generalization Gap of
      Adaptive Gradient Methods in Training Deep Neural Networks. arXiv:1806.06763

    Notes:
      Like its authors' code, the step never lets the second moment fall (AMSGrad). Gradient
      evaluations: none extra. State: three copies of the parameters for the step, one for the mean.
    """
    checks.check_number("partial", partial, low=0.0, high=0.5)
    _check(learning_rate, b1, b2, eps, weight_decay)
    tx = optax.chain(
        _scale_by_padam(b1, b2, eps, partial),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        swa(start=start, every=every),
    )
    return stage.needs_params("gadamx", tx)


def _check(learning_rate: Any, b1: Any, b2: Any, eps: Any, weight_decay: Any) -> None:
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_number("b1", b1, low=0.0, high=1.0, high_allowed=False)
    checks.check_number("b2", b2, low=0.0, high=1.0, high_allowed=False)
    checks.check_number("eps", eps, low=0.0)
    checks.check_number("weight_decay", weight_decay, low=0.0)


def _scale_by_padam(
    b1: float, b2: float, eps: float, partial: float
) -> optax.GradientTransformation:
    def init_fn(params: optax.Params) -> PadamState:
        return PadamState(
            step=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
            nu_max=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: optax.Updates, state: PadamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PadamState]:
        del params
        step = optax.safe_increment(state.step)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        correction = jnp.sqrt(1 - b2**step) / (1 - b1**step)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, optax.tree.cast_like(nu, state.nu))

        def leaf(m: jax.Array, v: jax.Array) -> jax.Array:
            scaled = m / (jnp.sqrt(v) + eps) ** (2 * partial)
            return (correction * scaled).astype(m.dtype)

        new_state = PadamState(
            step, optax.tree.cast_like(mu, state.mu), optax.tree.cast_like(nu, state.nu), nu_max
        )
        return jax.tree.map(leaf, mu, nu_max), new_state

    return optax.GradientTransformation(init_fn, update_fn)
