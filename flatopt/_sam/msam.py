"""Momentum-SAM (Becker et al., arXiv:2401.12033): parameters a step ahead along the momentum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, momenta, registry, tree_math
from flatopt._core.timing import in_use, value_at


class MsamState(NamedTuple):
    """State of `msam` and `msam_sgd`.

    Attributes:
      step: int32 scalar, number of updates so far.
      scale: float scalar, `rho / (|m| + 1e-12)` at the last step: the parameters stand at the
        centre minus `scale` times the momentum that `inner_state` holds.
      inner_state: state of the wrapped optimiser.
      in_use: "rho" of the last update, unless it is handed in as an array.
    """

    step: jax.Array
    scale: jax.Array
    inner_state: optax.OptState
    in_use: dict[str, jax.Array]

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the centre, `params + scale * momentum`."""
        momentum = momenta.find_first(self.inner_state, params, "msam")
        return tree_math.move(params, self.scale, momentum)


def shift_offset(
    update: Any, old_scale: Any, old_momentum: Any, scale: Any, momentum: Any
) -> optax.Updates:
    r"""The centre's update, plus the way from the old offset to the new one.

    With the offset :math:`-s \, m`: :math:`u + s_{t-1} m_{t-1} - s_t m_t`.
    """
    return tree_math.on_inexact(
        lambda u, m_old, m_new: u + (old_scale * m_old - scale * m_new),
        update,
        old_momentum,
        momentum,
    )


@registry.method("wrapper")
def msam(
    optimizer: optax.GradientTransformation, rho: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: sharpness-aware training without an extra gradient.

    .. math:: w_t = c_t - \rho \, m_{t-1} / \|m_{t-1}\|, \quad c_{t+1} = c_t + u(\nabla L(w_t), c_t)

    Args:
      optimizer: any optax transformation whose state holds one momentum (`trace`, `mu`, or that of
        `optax.ema`), m; leaves without one are not displaced.
      rho: length of the displacement, 0.3 and above are usual; negative is the ascent variant. A
        number, a traced array, or a schedule. 0: `optimizer`, bit for bit.

    Returns:
      A wrapper to be outermost. Evaluate at the centre c: `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.msam(optax.sgd(0.1, momentum=0.9), rho=0.5), jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(w), w)
      >>> w = optax.apply_updates(w, updates)
      >>> print(f"{w:.2f} {flatopt.eval_params(opt_state, w):.2f}")
      0.30 0.80

    References:
      Becker, Altrock, Risse. Momentum-SAM. arXiv:2401.12033

    Cost: 0 extra gradients; 0 copies.
    """

    def old_momentum(state: MsamState, new: Any, grads: Any) -> Any:
        del new
        return momenta.find_first(state.inner_state, grads, "msam")

    return _displaced(optimizer, rho, old_momentum)


@registry.method("optimizer")
def msam_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule,
    *,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM on SGD with momentum, with a pass over memory less than `msam`.

    .. math:: m_t = \mu m_{t-1} + g_t, \qquad m_{t-1} = (m_t - g_t) / \mu

    Args:
      learning_rate: of SGD: a number, a traced array, or a schedule of the step count.
      rho: as for `msam`.
      momentum: :math:`\mu`, in (0, 1]. Small values lose digits of the old momentum.

    Returns:
      `msam(optax.sgd(learning_rate, momentum), rho)`, but for rounding: a whole optimiser. Evaluate
      at the centre: `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, params = flatopt.msam_sgd(0.1, rho=0.5, momentum=0.9), jnp.array(1.0)
      >>> updates, opt_state = tx.update(jnp.array(2.0), tx.init(params), params)
      >>> print(f"{optax.apply_updates(params, updates):.2f}")
      0.30

    References:
      As for `msam`.

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("learning_rate", learning_rate)
    checks.check_number("momentum", momentum, low=0.0, high=1.0, schedule_allowed=False)
    if checks.is_number(momentum, 0):
        raise ValueError(
            f"momentum={momentum!r} is out of range: it must be in (0, 1], for it is divided by."
        )

    def old_momentum(state: MsamState, new: Any, grads: Any) -> Any:
        # The buffer is donated: to read it after the new one is written would take a copy.
        # benchmarks' step_time_mlp, over SGD: msam 1.08, msam_sgd 0.96.
        del state
        return jax.tree.map(lambda m, g: (m - g) / momentum, new, grads)

    return _displaced(optax.sgd(learning_rate, momentum), rho, old_momentum)


def _displaced(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    old_momentum: Callable[[MsamState, Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    checks.check_number("rho", rho)
    off = checks.is_number(rho, 0)  # Adding zero would still change how XLA rounds.
    optimizer = checks.as_transformation("optimizer", optimizer)

    def init_fn(params: optax.Params) -> MsamState:
        inner_state = optimizer.init(params)
        dtype = tree_math.scalar_dtype(momenta.find_first(inner_state, params, "msam"))
        step = jnp.zeros([], jnp.int32)
        told = in_use({"rho": rho}, {"rho": value_at(rho, step)}, step)
        return MsamState(step, jnp.zeros([], dtype), inner_state, told)

    def update_fn(
        updates: optax.Updates,
        state: MsamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MsamState]:
        centre = params if off or params is None else state.eval_params(params)
        extra_args["perturbed_params"] = params  # Where the gradient was taken.
        moves, inner_state = optimizer.update(updates, state.inner_state, centre, **extra_args)
        step = optax.safe_increment(state.step)
        if off:
            return moves, MsamState(step, state.scale, inner_state, state.in_use)
        new = tree_math.as_stored(momenta.find_first(inner_state, updates, "msam"))
        old = old_momentum(state, new, updates)
        length = value_at(rho, state.step)
        scale = length / (tree_math.norm(new) + tree_math.EPSILON)
        scale = jnp.asarray(scale, state.scale.dtype)
        moves = moves if params is None else tree_math.widened(moves, params)
        moves = shift_offset(moves, state.scale, old, scale, new)
        told = in_use({"rho": rho}, {"rho": length}, state.step)
        return moves, MsamState(step, scale, inner_state, told)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
