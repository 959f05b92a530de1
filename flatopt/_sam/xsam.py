"""XSAM (Chen and Zhou, arXiv:2603.10048): SAM that looks for the direction of the highest loss."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.timing import Every, nonnegative_at, value_at
from flatopt._sam.ascent import climb_to_norm, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage

ALPHAS = tuple(i / 4 for i in range(25))  # 0, 0.25, ..., 6.
SMALLEST_SINE = 1e-8  # Below it two directions are one, and there is no arc between them.


def angle(v0: Any, v1: Any) -> jax.Array:
    """The angle between two unit vectors."""
    # The product of two equal directions may be rounded to more than 1.
    return jnp.arccos(jnp.clip(tree_math.vdot(v0, v1), -1, 1))


def slerp(v0: Any, v1: Any, theta: Any, alpha: Any) -> Any:
    r""":math:`(\sin((1 - \alpha) \theta) \, v_0 + \sin(\alpha \theta) \, v_1) / \sin \theta`.

    On the arc from v0 (alpha 0) through v1 (alpha 1), and beyond; half the sum if both are one.
    """
    sine = jnp.sin(theta)
    is_arc = ~(sine < SMALLEST_SINE)  # True for NaN, which is to show.
    first = jnp.where(is_arc, jnp.sin((1 - alpha) * theta) / sine, 0.5)
    second = jnp.where(is_arc, jnp.sin(alpha * theta) / sine, 0.5)
    return tree_math.on_inexact(lambda y, x: first * x + second * y, v1, v0)


def highest(
    loss: Callable[[Any], jax.Array], arc: Callable[[Any], Any], params: Any, rho: Any, alphas: Any
) -> tuple[jax.Array, jax.Array]:
    r""":math:`\arg\max_\alpha L(w + \rho \, v(\alpha))`, and whether all its losses are finite."""

    def at(alpha: jax.Array) -> jax.Array:
        return loss(optax.apply_updates(params, tree_math.scale(rho, arc(alpha))))

    losses = jax.lax.map(at, alphas)  # One forward pass at a time is in memory.
    return alphas[jnp.argmax(losses)], jnp.isfinite(losses).all()


class ArcState(NamedTuple):
    """State of `follow_arc`.

    Attributes:
      step: int32 scalar, number of calls so far.
      alpha: float scalar, the position on the arc that was used last.
    """

    step: jax.Array
    alpha: jax.Array


def follow_arc(
    alpha: optax.ScalarOrSchedule | None = None,
    *,
    rho_max: optax.ScalarOrSchedule | None = None,
    alphas: Sequence[float] = ALPHAS,
    alpha_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns the gradient in the plane of ascent and gradient: XSAM's combiner.

    .. math:: \|g_n\| \, v(\alpha), \quad v(\alpha) =
      \frac{\sin((1 - \alpha) \theta) \, v_0 + \sin(\alpha \theta) \, v_1}{\sin \theta}

    Args:
      alpha: place from the unit vector v0 along the ascent (0) to v1 along its last gradient (1,
        SAM), theta apart: a number, an array, a schedule. None: the estimate of `xsam`.
      rho_max: radius of the arc that is searched, >= 0; for an estimate only. Likewise.
      alphas: where on the arc the loss is compared; the first of equals wins. Static.
      alpha_every: calls from one estimate to the next, >= 1; None is 100. Static.

    Returns:
      A combiner for `gradient_at`; an estimate asks for `grad_fn.value`, see `make_grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.gradient_at(flatopt.scale_to_norm(0.5), combiner=flatopt.follow_arc(2.0))
      >>> w, grad_fn = jnp.array([3.0, 1.0]), lambda w, i: w * jnp.array([1.0, 4.0])
      >>> print(tx.update(grad_fn(w, 0), tx.init(w), w, grad_fn=grad_fn)[0])
      [2.66 5.93]

    Cost: 0 extra gradients; 0 copies (+3 temporary); an estimate is `len(alphas)` forward passes.
    """
    grid = _check_arc(alpha, rho_max, alphas, alpha_every)
    when = Every.before_update(None, 100 if alpha_every is None else alpha_every)

    def init_fn(params: optax.Params) -> ArcState:
        return ArcState(jnp.zeros([], jnp.int32), jnp.ones([], tree_math.scalar_dtype(params)))

    def update_fn(
        updates: optax.Updates,
        state: ArcState,
        params: optax.Params | None = None,
        *,
        perturbed_params: optax.Params | None = None,
        grad_fn: Any = None,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ArcState]:
        del extra_args
        if perturbed_params is None:
            raise ValueError(
                "flatopt.follow_arc needs the point where the gradient was taken. Use it as "
                "`flatopt.gradient_at(perturbation, combiner=flatopt.follow_arc(...))`."
            )
        step = state.step if step is None else step
        ascent = tree_math.add_scaled(perturbed_params, -1, params)
        v0, v1 = climb_to_norm(ascent, 1), climb_to_norm(updates, 1)
        theta = angle(v0, v1)

        def arc(alpha: Any) -> Any:
            return slerp(v0, v1, theta, alpha)

        def estimate(old: jax.Array) -> jax.Array:
            loss = checks.require_value_fn("follow_arc", grad_fn)
            radius = nonnegative_at(rho_max, step)
            new, finite = highest(loss, arc, params, radius, jnp.asarray(grid, old.dtype))
            return jnp.where(finite, new, old)

        if alpha is None:
            now = when.run(state.step, estimate, state.alpha)
        else:
            now = jnp.asarray(value_at(alpha, step), state.alpha.dtype)
        turned = tree_math.scale(tree_math.norm(updates), arc(now))
        return turned, ArcState(optax.safe_increment(state.step), now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@registry.method("stage", needs=("grad_fn",))
def xsam(
    rho: optax.ScalarOrSchedule,
    rho_max: optax.ScalarOrSchedule | None = None,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    alphas: Sequence[float] = ALPHAS,
    alpha_every: int | None = None,
    num_steps: int | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""XSAM: SAM whose gradient is turned towards the highest loss nearby.

    .. math:: g \leftarrow \|g_n\| \, v(\alpha), \qquad
      \alpha = \arg\max L(w + \rho_{max} \, v(\alpha)), \qquad v(1) = g_n / \|g_n\|

    Args:
      rho: radius of each ascent step, >= 0: a number, a traced array, or a schedule; see `sam`.
      rho_max, alpha, alphas, alpha_every: see `follow_arc`; one of the first two is needed.
      num_steps: ascent steps n, >= 1; None is 1. Static.
      start, every: when it acts; see `gradient_at`. An estimate counts the times that it acts.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.xsam(rho=0.5, rho_max=1.0), jnp.array([3.0, 1.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w[0] ** 2 + 4.0 * w[1] ** 2))
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
      [2.66 5.93]

    References:
      Chen, Zhou. Revisiting Sharpness-Aware Minimization. arXiv:2603.10048

    Cost: `num_steps` extra gradients; 0 copies (+3 temporary); forward passes as in `follow_arc`.
    """
    checks.check_number("rho", rho, low=0.0)
    combiner = follow_arc(alpha, rho_max=rho_max, alphas=alphas, alpha_every=alpha_every)
    climb = scale_to_norm(rho)
    return ascent_stage(
        rho, climb, num_steps=num_steps, combiner=combiner, start=start, every=every
    )


def _check_arc(alpha: Any, rho_max: Any, alphas: Any, alpha_every: Any) -> np.ndarray:
    """Raises for wrong arguments of `follow_arc`; returns where on the arc the loss is compared."""
    checks.check_count("alpha_every", alpha_every, 1)
    if rho_max is not None:
        checks.check_number("rho_max", rho_max, low=0.0)
    if alpha is not None:
        checks.check_number("alpha", alpha)
    elif rho_max is None:
        raise ValueError(
            "rho_max=None: alpha is estimated on an arc, which needs its radius. Give rho_max=0.1, "
            "or so, or a number as alpha."
        )
    try:
        grid = np.asarray(alphas, float)
    except (TypeError, ValueError):
        grid = np.zeros([0])
    if grid.ndim != 1 or not grid.size or not np.isfinite(grid).all():
        raise ValueError(f"alphas={alphas!r} must be a sequence of finite numbers, at least one.")
    return grid
