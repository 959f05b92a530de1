"""SAMPa (Xie et al., arXiv:2410.10683): the two gradients of a step do not wait for one another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import in_use, value_at
from flatopt._sam import combiners


def ascent_point(params: Any, gradient: Any, rho: Any) -> Any:
    r""":math:`w + \rho \, q / (\|q\| + 10^{-12})`; a rho below zero counts as zero."""
    length = jnp.maximum(rho, 0) / (tree_math.norm(gradient) + tree_math.EPSILON)
    return tree_math.add_scaled(params, length, gradient)


def both_gradients(
    grad_fn: GradientFunction, first: Any, second: Any, axis_name: str | None
) -> tuple[Any, Any]:
    """Gradient 0 at `first` and gradient 1 at `second`, at once."""
    if axis_name is None:
        points = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
        grads = jax.vmap(grad_fn)(points, jnp.arange(2))
        return jax.tree.map(lambda g: g[0], grads), jax.tree.map(lambda g: g[1], grads)
    number = jax.lax.axis_size(axis_name)
    if number != 2:
        raise ValueError(
            f"axis_name={axis_name!r} names a mesh axis of size "
            f"{number}: flatopt.sampa needs 2, one device a gradient."
        )
    index = jax.lax.axis_index(axis_name)
    grads = grad_fn(optax.tree.where(index == 0, first, second), index)
    zeros = optax.tree.zeros_like(grads)
    return (
        jax.lax.psum(optax.tree.where(index == 0, grads, zeros), axis_name),
        jax.lax.psum(optax.tree.where(index == 1, grads, zeros), axis_name),
    )


def keep_finite(latest: Any, old: Any) -> Any:
    """`latest` in the dtypes of `old`: an overflow must not spoil the points of the next step."""
    finite = jnp.isfinite(tree_math.norm(latest))
    return optax.tree.where(finite, tree_math.cast_like(latest, old), old)


class SampaState(NamedTuple):
    """State of `sampa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      inner_state: state of the wrapped optimiser.
      gradient: tree like the parameters, the last gradient at the extrapolated point; zeros before
        the first.
      in_use: "rho" and "mix" of the last update, unless they are handed in as arrays.
    """

    step: jax.Array
    inner_state: optax.OptState
    gradient: optax.Updates
    in_use: dict[str, jax.Array]


@registry.method("wrapper", needs=("grad_fn",))
def sampa(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    *,
    mix: optax.ScalarOrSchedule = 0.2,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: SAM whose two gradients are taken at the same time.

    .. math:: p = \nabla L_0(w + \rho \, q / \|q\|), \quad q' = \nabla L_1(w + u(q)), \quad
      w \leftarrow w + u\big((1 - \lambda) \, p + \lambda \, q'\big)

    Args:
      optimizer: any optax transformation, u.
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      mix: :math:`\lambda`, share of the gradient q at the extrapolated point, in [0, 1]: likewise.
      axis_name: a mesh axis of size 2 under `shard_map`; None: one `vmap` over both. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params` and `grad_fn`, of which it takes
      `grad_fn(w, 0)` for p and `grad_fn(w, 1)` for q'. The gradient of the loop is not used.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.sampa(optax.sgd(0.1), rho=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [-0.3 -0.4]

    References:
      Xie, Pethick, Cevher. SAMPa: Sharpness-Aware Minimization Parallelized. arXiv:2410.10683

    Cost: 2 extra gradients, side by side; 1 copy (+4 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("mix", mix, low=0.0, high=1.0)
    optimizer = checks.as_transformation("optimizer", optimizer)
    off = checks.is_number(rho, 0)
    given = {"rho": rho, "mix": mix}

    def values_at(step: Any) -> dict[str, Any]:
        return {name: value_at(value, step) for name, value in given.items()}

    def init_fn(params: optax.Params) -> SampaState:
        gradient, step = optax.tree.zeros_like(params), jnp.zeros([], jnp.int32)
        return SampaState(step, optimizer.init(params), gradient, in_use(given, values_at(step), step))

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
            moves, inner = optimizer.update(updates, state.inner_state, params, **extra_args)
            return moves, state._replace(step=step, inner_state=inner)
        gradient = checks.require_grad_fn("sampa", grad_fn, params)
        values = values_at(state.step)
        ascent = ascent_point(params, state.gradient, values["rho"])
        move, _ = optimizer.update(state.gradient, state.inner_state, params, **extra_args)
        # Without a gradient there is nothing to extrapolate, though weight decay alone would move.
        ahead = tree_math.add_scaled(params, jnp.float32(state.step > 0), move)
        perturbed, latest = both_gradients(gradient, ascent, ahead, axis_name)
        grads = combiners.mix(latest, perturbed, values["mix"])
        grads = tree_math.cast_like(grads, updates)
        moves, inner = optimizer.update(grads, state.inner_state, params, **extra_args)
        latest = keep_finite(latest, state.gradient)
        return moves, SampaState(step, inner, latest, in_use(given, values, step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
