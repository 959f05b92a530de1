"""Gadam and GadamX (Granziol et al., arXiv:2003.01247): adaptive steps, averaged weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.swa import swa
from flatopt._core import checks, registry, stage, tree_math


class PadamState(NamedTuple):
    """State of the partially adaptive step of `gadamx`.

    Attributes:
      t: int32 scalar, number of updates so far, which corrects the bias of the means.
      mu: tree like the parameters, decaying mean of the gradients.
      nu: tree like the parameters, decaying mean of their squares.
      nu_max: tree like the parameters, the largest value that each entry of `nu` has had.
    """

    t: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def weight_so_far(b: float, t: jax.Array) -> jax.Array:
    """The sum of the shares in a decaying mean of t numbers, :math:`1 - b^t`, for b near 1 too."""
    c = jnp.asarray(1 - b, float)  # Before the cast: in float32 a b within 1e-8 of 1 is 1.
    total = -jnp.expm1(t * jnp.log1p(-jnp.minimum(c, 1 - jnp.finfo(c.dtype).epsneg)))
    return jnp.where(c < 1, total, 1)


def padam_step(
    grads: optax.Updates, state: PadamState, *, b1: float, b2: float, eps: float, partial: float
) -> tuple[optax.Updates, PadamState]:
    r"""Padam's direction, Adam's mean over :math:`(\sqrt{\bar v_t} + \epsilon)^{2p}`."""
    t = optax.safe_increment(state.t)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    correction = jnp.sqrt(weight_so_far(b2, t)) / weight_so_far(b1, t)
    nu_max = jax.tree.map(jnp.maximum, state.nu_max, tree_math.cast_like(nu, state.nu))

    def leaf(m: jax.Array, v: jax.Array) -> jax.Array:
        return (correction * (m / (jnp.sqrt(v) + eps) ** (2 * partial))).astype(m.dtype)

    kept = (tree_math.cast_like(mu, state.mu), tree_math.cast_like(nu, state.nu), nu_max)
    return jax.tree.map(leaf, mu, nu_max), PadamState(t, *kept)


@registry.method("optimizer")
def gadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW, evaluated at the equal-weight mean of its weights.

    .. math:: w_{t+1} = (1 - \eta \lambda) w_t - \eta \, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Args:
      learning_rate: :math:`\eta`, >= 0: a number, a traced array, or a schedule of the step count.
      b1, b2, eps: Adam's decays, in [0, 1), and :math:`\epsilon`, >= 0.
      weight_decay: :math:`\lambda`, >= 0, decoupled: a number, a traced array, or a schedule.
      start, every, accumulator_dtype: of the mean; see `swa`. The authors take it once an epoch.

    Returns:
      A whole optimiser; needs `params`. The mean is `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.gadam(0.1, weight_decay=0.0), jnp.array(1.0)
      >>> updates, opt_state = tx.update(w, tx.init(w), w)
      >>> print(f"{optax.apply_updates(w, updates):.3f}")
      0.900

    References:
      Granziol, Wan, Albanie, Roberts. Iterative Averaging in the Quest for Best Test Error.
      arXiv:2003.01247

    Cost: 0 extra gradients; 3 copies, Adam's two among them.
    """
    step = optax.scale_by_adam(b1, b2, eps)
    mean = swa(start=start, every=every, accumulator_dtype=accumulator_dtype)
    _check(b1=b1, b2=b2, eps=eps)
    return _averaged("gadam", step, learning_rate, weight_decay, mean)


@registry.method("optimizer")
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
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Partially adaptive Adam, evaluated at the equal-weight mean of its weights.

    .. math:: w_{t+1} = (1 - \eta \lambda) w_t - \eta \, \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \,
      m_t \big/ (\sqrt{\bar v_t} + \epsilon)^{2p}, \qquad \bar v_t = \max(\bar v_{t-1}, v_t)

    Args:
      learning_rate, b1, b2, weight_decay, start, every, accumulator_dtype: as for `gadam`.
      eps: :math:`\epsilon`, >= 0. Unlike in `optax.adam`, it is added before bias correction.
      partial: p, in [0, 1/2]: 1/2 is AMSGrad, 0 is SGD with momentum (and a bias correction).

    Returns:
      A whole optimiser; needs `params`. The mean is `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.gadamx(0.1, weight_decay=0.0), jnp.array(1.0)
      >>> updates, opt_state = tx.update(w, tx.init(w), w)
      >>> print(f"{optax.apply_updates(w, updates):.3f}")
      0.993

    References:
      As for `gadam`. The step: Chen, Zhou, Tang, Yang, Cao, Gu. Closing the Generalization Gap of
      Adaptive Gradient Methods in Training Deep Neural Networks. arXiv:1806.06763

    Cost: 0 extra gradients; 4 copies, the step's three among them.
    """
    checks.check_number("partial", partial, low=0.0, high=0.5, schedule_allowed=False)
    _check(b1=b1, b2=b2, eps=eps)
    step = scale_by_padam(b1=b1, b2=b2, eps=eps, partial=partial)
    mean = swa(start=start, every=every, accumulator_dtype=accumulator_dtype)
    return _averaged("gadamx", step, learning_rate, weight_decay, mean)


def scale_by_padam(
    *, b1: float, b2: float, eps: float, partial: float
) -> optax.GradientTransformation:
    """The transformation around `padam_step`."""

    def init_fn(params: optax.Params) -> PadamState:
        mu, nu, nu_max = (optax.tree.zeros_like(params) for _ in range(3))
        return PadamState(jnp.zeros([], jnp.int32), mu, nu, nu_max)

    def update_fn(
        updates: optax.Updates, state: PadamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, PadamState]:
        del params
        return padam_step(updates, state, b1=b1, b2=b2, eps=eps, partial=partial)

    return optax.GradientTransformation(init_fn, update_fn)


def _check(*, b1: float, b2: float, eps: float) -> None:
    for name, decay in (("b1", b1), ("b2", b2)):
        checks.check_number(
            name, decay, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
        )
    checks.check_number("eps", eps, low=0.0, schedule_allowed=False)


def _averaged(
    name: str,
    step: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mean: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The whole optimiser of the factory `name`: step, decoupled decay, rate, mean."""
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_number("weight_decay", weight_decay, low=0.0)
    decay = optax.add_decayed_weights(weight_decay)
    rate = optax.scale_by_learning_rate(learning_rate)
    return stage.needs_params(name, optax.chain(step, decay, rate, mean))
