"""SAMPa: the two gradients of a step do not wait for one another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import value_at


class SampaState(NamedTuple):
    """State of `sampa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      inner_state: state of the wrapped optimiser.
      gradient: tree like the parameters, the last gradient at the extrapolated point; zeros before
        the first.
    """

    step: jax.Array
    inner_state: optax.OptState
    gradient: optax.Updates


def sampa(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    *,
    mix: optax.ScalarOrSchedule = 0.2,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: SAM whose two gradients are taken at the same time.

    With q the last gradient at the extrapolated point, and u(g) the update that `optimizer` makes
    of the gradient g:

    .. math::
      p = \nabla L_0(w + \rho \, q / \|q\|), \qquad
      q' = \nabla L_1(w + u(q)), \qquad
      w \leftarrow w + u\big((1 - \lambda) \, p + \lambda \, q'\big)

    Args:
      optimizer: any optax transformation.
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 this is `optimizer` and takes no gradient of its own.
      mix: :math:`\lambda`, share of the extrapolated gradient, in [0, 1]: likewise.
      axis_name: name of a mesh axis of size 2 that the step runs in under `shard_map`: each of the
        two devices takes one gradient. None: one `vmap` over both. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params` and `grad_fn`. `grad_fn(params, 0)` is the
      gradient at the ascent point, which the authors take on the batch of the step before;
      `grad_fn(params, 1)` the one at the extrapolated point, on the batch of this step. The
      gradient that the loop passes is not used: under `jit` it is not even computed.

    Raises:
      ValueError: if an argument is out of range, `params` or `grad_fn` is missing, or the mesh axis
        has not two devices.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.sampa(optax.sgd(0.1), rho=0.5)
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(params, opt_state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      [2.412 3.216]

    References:
      Xie, Pethick, Cevher. SAMPa: Sharpness-Aware Minimization Parallelized. arXiv:2410.10683

    Notes:
      The first step is not displaced, for want of a direction. Gradient evaluations: two, which run
      side by side. State: that of `optimizer`, one copy of the parameters, one integer; the two
      points and gradients are temporary.
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("mix", mix, low=0.0, high=1.0)
    optimizer = optax.with_extra_args_support(optimizer)
    off = checks.is_number(rho, 0)

    def both(gradient: GradientFunction, ascent: Any, ahead: Any) -> tuple[Any, Any]:
        """The gradients 0 and 1, at `ascent` and `ahead`."""
        if axis_name is None:
            points = jax.tree.map(lambda a, b: jnp.stack([a, b]), ascent, ahead)
            grads = jax.vmap(gradient)(points, jnp.arange(2))
            return jax.tree.map(lambda g: g[0], grads), jax.tree.map(lambda g: g[1], grads)
        if jax.lax.axis_size(axis_name) != 2:
            raise ValueError(
                f"axis_name={axis_name!r} names a mesh axis of size "
                f"{jax.lax.axis_size(axis_name)}: flatopt.sampa needs 2, one device a gradient."
            )
        index = jax.lax.axis_index(axis_name)
        point = optax.tree.where(index == 0, ascent, ahead)
        grads = gradient(point, index)
        return (
            jax.lax.psum(_only(index == 0, grads), axis_name),
            jax.lax.psum(_only(index == 1, grads), axis_name),
        )

    def init_fn(params: optax.Params) -> SampaState:
        return SampaState(
            step=jnp.zeros([], jnp.int32),
            inner_state=optimizer.init(params),
            gradient=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: SampaState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SampaState]:
        step = optax.safe_increment(state.step)
        if off:
            updates, inner = optimizer.update(updates, state.inner_state, params, **extra_args)
            return updates, SampaState(step, inner, state.gradient)
        gradient = checks.require_grad_fn("sampa", grad_fn, params)
        radius = jnp.maximum(value_at(rho, state.step), 0)
        length = radius / (tree_math.norm(state.gradient) + tree_math.EPSILON)
        ascent = tree_math.add_scaled(params, length, state.gradient)
        move, _ = optimizer.update(state.gradient, state.inner_state, params, **extra_args)
        # Without a gradient there is nothing to extrapolate, though weight decay alone would move.
        ahead = tree_math.add_scaled(params, (state.step > 0).astype(length.dtype), move)
        perturbed, latest = both(gradient, ascent, ahead)
        share = value_at(mix, state.step)
        mixed = jax.tree.map(
            lambda p, q, u: ((1 - share) * p + share * q).astype(u.dtype),
            perturbed,
            latest,
            updates,
        )
        new_updates, inner = optimizer.update(mixed, state.inner_state, params, **extra_args)
        # An overflow must not spoil the points of the next step.
        finite = jnp.isfinite(tree_math.norm(latest))
        latest = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b).astype(b.dtype), latest, state.gradient
        )
        return new_updates, SampaState(step, inner, latest)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _only(condition: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)
