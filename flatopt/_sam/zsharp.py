"""ZSharp (Yun, arXiv:2505.02369): the ascent follows the entries that stand out in their layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math
from flatopt._core import quantile as _quantile
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


def keep_large_zscores(quantile: float) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the entries of the gradient that stand out in their leaf: ZSharp's filter.

    .. math::
      z = (g - \mathrm{mean}(g)) / \mathrm{std}(g), \qquad
      d_i = g_i \, [\,|z_i| \ge Q_q(|z|)\,]

    Args:
      quantile: q, in [0, 1): the share of each leaf's entries to drop; 0.95 is the paper's. A
        number or a traced array.

    Returns:
      A transformation to be chained before `scale_to_norm`. Mean, deviation and quantile are those
      of one leaf at a time, so that every leaf keeps its own largest entries.

    Raises:
      ValueError: if `quantile` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.keep_large_zscores(0.5)
      >>> grads = jnp.array([0.1, 4.0, -0.1, -4.0])
      >>> print(direction.update(grads, direction.init(grads))[0])
      [ 0.  4.  0. -4.]

    References:
      Yun. Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks.
      arXiv:2505.02369

    Notes:
      Within a leaf the deviation divides both sides and drops out, so it is not computed. State:
      none. Its cost: some 35 sweeps over each leaf, which on large layers with little arithmetic is
      more than a gradient.
    """
    checks.check_number("quantile", quantile, low=0.0, high=1.0, high_allowed=False)

    def leaf(g: jax.Array) -> jax.Array:
        if g.size == 0:
            return g
        wide = g.astype(tree_math.accumulator_dtype(g.dtype))
        distance = jnp.abs(wide - jnp.mean(wide))
        # The slack keeps ties together: the two entries of a pair are equally far from their mean.
        threshold = (1 - 1e-5) * _quantile.quantile(distance, quantile)
        return jnp.where(distance >= threshold, g, jnp.zeros_like(g))

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        return jax.tree.map(leaf, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def zsharp(
    rho: optax.ScalarOrSchedule,
    *,
    quantile: float = 0.95,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ZSharp: the ascent follows only the entries of the gradient that stand out in their layer.

    .. math::
      g \leftarrow \nabla L(w + \rho \, d / \|d\|), \qquad d_i = g_i \, [\,|z_i| \ge Q_q(|z|)\,]

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      quantile: q, in [0, 1): the share of each leaf's entries to leave out; 0 is `sam`. A number or
        a traced array.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.zsharp(rho=0.5, quantile=0.5), optax.sgd(0.1))
      >>> params = jnp.array([0.1, 4.0, -0.1, -4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.01   -0.4354  0.01    0.4354]

    References:
      Yun. Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks.
      arXiv:2505.02369

    Notes:
      The quantile is that of each leaf: see `keep_large_zscores`. Place: as for `sam`. Gradient
      evaluations: one extra per sharp update. State: two integers; one temporary copy of the
      parameters.
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(keep_large_zscores(quantile), scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)
