"""Sparse SAM (Mi et al., arXiv:2210.05177): the ascent moves the weights in a mask."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, quantile, registry, rng, tree_math
from flatopt._core.timing import Every
from flatopt._sam.ascent import mask_displacement, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


def number_to_drop(t: Any, live: int, dead: int, drop_rate: Any, decay_steps: int | None) -> Any:
    r""":math:`\tfrac r2 (1 + \cos(\pi t / T)) \, n` of n live weights, at most the dead ones."""
    share: Any = 1.0
    if decay_steps is not None:
        share = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(t / float(decay_steps), 1.0)))
    return jnp.minimum(jnp.round(drop_rate * share * live).astype(jnp.int32), dead)


def regrow(mask: Any, grads: Any, draws: Any, dropped: Any, live: int) -> Any:
    """Drops the `dropped` live weights of the smallest gradients for as many random dead ones."""

    def importance(m: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.where(m, jnp.nan_to_num(tree_math.square(g), posinf=jnp.inf), jnp.nan)

    stay = quantile.largest_in_tree(jax.tree.map(importance, mask, grads), live - dropped)
    dead = jax.tree.map(lambda m, u: jnp.where(m, jnp.nan, u), mask, draws)
    return jax.tree.map(jnp.logical_or, stay, quantile.largest_in_tree(dead, dropped))


def add_squares(total: Any, grads: Any) -> Any:
    """`total` and the squares of `grads`, in the dtypes of `total`."""
    return jax.tree.map(lambda t, g: t + tree_math.square(g).astype(t.dtype), total, grads)


@registry.method("stage", needs=("grad_fn",))
def sparse_sam(
    rho: optax.ScalarOrSchedule,
    mask: Any,
    *,
    epsilon: float = tree_math.EPSILON,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM: the ascent moves only the weights in a mask.

    .. math:: g \leftarrow \nabla L(w + m \circ \rho \, g / \|g\|)

    Args:
      rho: radius of the whole step, of which the mask keeps a part; see `sam`.
      mask: what moves; see `mask_displacement`. Static. For masks that change use
        `gradient_at(mask_by_fisher(scale_to_norm(rho), ...))` or `mask_at_random`.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.sparse_sam(0.5, jnp.array([True, False])), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.3 4. ]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(scale_to_norm(rho, epsilon=epsilon), mask_displacement(mask))
    return ascent_stage(rho, perturbation, start=start, every=every)


class FisherMaskState(NamedTuple):
    """State of `mask_by_fisher`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      mask: tree of bools shaped like the parameters.
      fisher: tree like the parameters, squared gradients summed since the mask was last made.
      perturbation_state: state of the masked perturbation.
    """

    step: jax.Array
    mask: Any
    fisher: optax.Updates
    perturbation_state: optax.OptState


def mask_by_fisher(
    perturbation: optax.GradientTransformation, sparsity: float, *, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs only the weights with the largest Fisher information: the mask of SSAM-F.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i, \quad
      m_i = 1 \text{ for the } (1 - s) N \text{ largest } F_i = \sum_t g_{t,i}^2

    Args:
      perturbation: from the whole gradient to a displacement, such as `scale_to_norm(rho)`.
      sparsity: s, share of the weights that are left alone, in [0, 1). Static.
      every: displacements between two masks, >= 1; F starts anew with each. Static.

    Returns:
      A perturbation; the first mask is made from the first gradient. `tx.update(..., fisher=)`, a
      tree of squares such as `empirical_fisher`, takes the place of F; inf and NaN never enter.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(0.5), sparsity=0.5, every=10)
      >>> grads = jnp.array([3.0, 4.0])
      >>> print(perturbation.update(grads, perturbation.init(grads), grads)[0])
      [0.  0.4]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger. arXiv:2210.05177

    Cost: 0 extra gradients; 1.25 copies (+2 temporary, read some 55 times by a new mask).
    """
    when = _checked(sparsity, every)
    perturbation = checks.as_transformation("perturbation", perturbation)

    def init_fn(params: optax.Params) -> FisherMaskState:
        mask = jax.tree.map(lambda p: jnp.zeros_like(p, bool), params)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, tree_math.scalar_dtype(p)), params)
        return FisherMaskState(jnp.zeros([], jnp.int32), mask, zeros, perturbation.init(params))

    def update_fn(
        updates: Any,
        state: FisherMaskState,
        params: Any = None,
        *,
        fisher: Any = None,
        **kwargs: Any,
    ) -> tuple[optax.Updates, FisherMaskState]:
        moves, inner = perturbation.update(updates, state.perturbation_state, params, **kwargs)
        if fisher is None:
            finite = jnp.isfinite(tree_math.norm(updates))
            squares = add_squares(state.fisher, updates)
            fisher = optax.tree.where(finite, squares, state.fisher)

        def renew(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            number = round((1 - sparsity) * tree_math.size(updates))
            return quantile.largest_in_tree(carry[1], number), optax.tree.zeros_like(carry[1])

        carry = (state.mask, tree_math.cast_like(fisher, state.fisher))
        mask, fisher = when.run(state.step, renew, carry)
        step = optax.safe_increment(state.step)
        return _apply(mask, moves), FisherMaskState(step, mask, fisher, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RandomMaskState(NamedTuple):
    """State of `mask_at_random`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      key: uint32 key data.
      mask: tree of bools shaped like the parameters.
      perturbation_state: state of the masked perturbation.
    """

    step: jax.Array
    key: jax.Array
    mask: Any
    perturbation_state: optax.OptState


def mask_at_random(
    perturbation: optax.GradientTransformation,
    sparsity: float,
    *,
    every: int,
    drop_rate: jax.typing.ArrayLike = 0.5,
    decay_steps: int | None = None,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs random weights; the smallest give way to others bit by bit: the mask of SSAM-D.

    .. math:: n_t = \tfrac{r}{2} \, (1 + \cos(\pi t / T)) \, (1 - s) N

    Args:
      perturbation, sparsity: see `mask_by_fisher`; the number of live weights never changes.
      every: displacements between two renewals, >= 1. Static.
      drop_rate: r, share of the live weights that the first renewal drops, in [0, 1].
      decay_steps: T, displacements until nothing is dropped any more, >= 1; None: no decay. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A perturbation.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.mask_at_random(flatopt.scale_to_norm(1.0), sparsity=0.75, every=5)
      >>> grads = jnp.ones(100)
      >>> print((perturbation.update(grads, perturbation.init(grads), grads)[0] != 0).sum())
      25

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger. arXiv:2210.05177

    Cost: 0 extra gradients; 0.25 copies (+2 temporary, read some 110 times by a renewal).
    """
    when = _checked(sparsity, every)
    checks.check_count("decay_steps", decay_steps, 1)
    checks.check_number("drop_rate", drop_rate, low=0.0, high=1.0, schedule_allowed=False)
    perturbation = checks.as_transformation("perturbation", perturbation)
    stream = rng.Stream(key)

    def init_fn(params: optax.Params) -> RandomMaskState:
        left, use = stream.split(stream.init())
        live = round((1 - sparsity) * tree_math.size(params))
        mask = quantile.largest_in_tree(rng.uniform_like(use, params), live)
        return RandomMaskState(jnp.zeros([], jnp.int32), left, mask, perturbation.init(params))

    def update_fn(
        updates: Any, state: RandomMaskState, params: Any = None, **kwargs: Any
    ) -> tuple[optax.Updates, RandomMaskState]:
        moves, inner = perturbation.update(updates, state.perturbation_state, params, **kwargs)

        def renew(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            left, use = stream.split(carry[1])
            size = tree_math.size(updates)
            live = round((1 - sparsity) * size)
            dropped = number_to_drop(state.step, live, size - live, drop_rate, decay_steps)
            return regrow(carry[0], updates, rng.uniform_like(use, updates), dropped, live), left

        due = (state.step > 0) & when.is_due(state.step)
        mask, left = tree_math.apply_if(due, renew, (state.mask, state.key))
        step = optax.safe_increment(state.step)
        return _apply(mask, moves), RandomMaskState(step, left, mask, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(sparsity: float, every: int) -> Every:
    checks.check_number(
        "sparsity", sparsity, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
    )
    checks.check_count("every", every, 1, none_allowed=False)
    return Every.before_update(None, every)


def _apply(mask: Any, displacement: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda m, d: jnp.where(m, d, jnp.zeros_like(d)), mask, displacement)
