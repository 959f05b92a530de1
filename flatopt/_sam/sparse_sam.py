"""Sparse SAM (Mi et al., arXiv:2210.05177): the ascent moves the weights in a mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core import quantile as _quantile
from flatopt._sam.ascent import mask_displacement, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


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
      rho: radius of the whole ascent step, >= 0, of which the mask keeps a part: a number, a traced
        array, or a schedule of the step count. With the number 0 the stage is the identity and
        takes no gradient.
      mask: what moves; see `mask_displacement`. Static. For masks that change use
        `gradient_at(mask_by_fisher(scale_to_norm(rho), ...))` or `mask_at_random`.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> mask = jnp.array([True, False])
      >>> tx = optax.chain(flatopt.sparse_sam(rho=0.5, mask=mask), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.33 -0.4 ]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      The second gradient is still a whole one: a sparse ascent saves no time. Place: as for `sam`.
      Gradient evaluations: one extra per sharp update. State: two integers; one temporary copy of
      the parameters.
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


def mask_by_fisher(
    perturbation: optax.GradientTransformation, sparsity: float, *, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs only the weights with the largest Fisher information: the mask of SSAM-F.

    .. math::
      \epsilon_i \leftarrow m_i \, \epsilon_i, \qquad
      m_i = 1 \text{ for the } (1 - s) N \text{ largest } F_i = \sum_t g_{t,i}^2

    Args:
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`.
        It sees the whole gradient, so that the masked displacement is shorter than rho, as in the
        authors' code.
      sparsity: s, share of the weights that are left alone, in [0, 1). Static.
      every: displacements between two masks, >= 1. Static.

    Returns:
      A perturbation. The first mask is made from the first gradient, later ones from the gradients
      since the last one. Pass `fisher=`, a tree of squared gradients such as `empirical_fisher`
      gives, to `tx.update` to use it in their place. A gradient with inf or NaN does not enter.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(0.5), sparsity=0.5, every=10)
      >>> grads = jnp.array([3.0, 4.0])
      >>> print(perturbation.update(grads, perturbation.init(grads), grads)[0])
      [0.  0.4]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      The authors sum squared gradients of single examples at the time of the new mask, and begin
      with an empty mask. Squares of minibatch gradients cost nothing extra. Gradient evaluations:
      none of its own. State: one copy of the parameters, a quarter of one (bools), two integers;
      a new mask reads two temporary copies some 55 times.
    """
    _check_sparsity(sparsity)
    checks.check_count("every", every, 1)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> FisherMaskState:
        return FisherMaskState(
            step=jnp.zeros([], jnp.int32),
            mask=jax.tree.map(lambda p: jnp.zeros_like(p, bool), params),
            fisher=jax.tree.map(lambda p: jnp.zeros_like(p, tree_math.scalar_dtype(p)), params),
            perturbation_state=perturbation.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: FisherMaskState,
        params: optax.Params | None = None,
        *,
        fisher: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FisherMaskState]:
        displacement, perturbation_state = perturbation.update(
            updates, state.perturbation_state, params, **extra_args
        )
        if fisher is None:
            fisher = add_squares(state.fisher, updates)
            finite = jnp.isfinite(tree_math.norm(updates))
            fisher = optax.tree.where(finite, fisher, state.fisher)

        def renew(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            _, fisher = carry
            number = round((1 - sparsity) * _size(fisher))
            return _largest(fisher, number), optax.tree.zeros_like(fisher)

        carry = (state.mask, optax.tree.cast_like(fisher, state.fisher))
        mask, fisher = tree_math.apply_if(state.step % every == 0, renew, carry)
        step = optax.safe_increment(state.step)
        new_state = FisherMaskState(step, mask, fisher, perturbation_state)
        return _apply_mask(mask, displacement), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mask_at_random(
    perturbation: optax.GradientTransformation,
    sparsity: float,
    *,
    every: int,
    drop_rate: float = 0.5,
    decay_steps: int | None = None,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs a random set of weights that is renewed bit by bit: the mask of SSAM-D.

    At a renewal the live weights with the smallest gradients are dropped, as many as a cosine of
    the step tells, and random dead ones take their places:

    .. math:: n_t = \tfrac{r}{2} \, (1 + \cos(\pi t / T)) \, (1 - s) N

    Args:
      perturbation: transformation from a gradient to a displacement; it sees the whole gradient.
      sparsity: s, share of the weights that are left alone, in [0, 1). Static.
      every: displacements between two renewals, >= 1. Static.
      drop_rate: r, share of the live weights that the first renewal drops, in [0, 1].
      decay_steps: T, displacements until nothing is dropped any more, >= 1; None: no decay. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A perturbation. The number of live weights never changes.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.mask_at_random(flatopt.scale_to_norm(1.0), sparsity=0.75, every=5)
      >>> grads = jnp.ones(100)
      >>> displacement, _ = perturbation.update(grads, perturbation.init(grads), grads)
      >>> print((displacement != 0).sum())
      25

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      Gradient evaluations: none of its own. State: a quarter of a copy of the parameters (bools),
      one key, two integers; a renewal reads temporary copies some 110 times.
    """
    _check_sparsity(sparsity)
    checks.check_count("every", every, 1)
    checks.check_count("decay_steps", decay_steps, 1)
    checks.check_number("drop_rate", drop_rate, low=0.0, high=1.0)
    perturbation = optax.with_extra_args_support(perturbation)
    data = rng.key_data(key)

    def init_fn(params: optax.Params) -> RandomMaskState:
        keep, use = rng.split(data)
        number = round((1 - sparsity) * _size(params))
        return RandomMaskState(
            step=jnp.zeros([], jnp.int32),
            key=keep,
            mask=_largest(rng.uniform_like(use, params), number),
            perturbation_state=perturbation.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: RandomMaskState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomMaskState]:
        displacement, perturbation_state = perturbation.update(
            updates, state.perturbation_state, params, **extra_args
        )
        number = round((1 - sparsity) * _size(updates))

        def renew(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            mask, key = carry
            keep_key, use = rng.split(key)
            share: jax.typing.ArrayLike = 1.0
            if decay_steps is not None:
                progress = jnp.minimum(state.step / decay_steps, 1.0)
                share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            dropped = jnp.round(drop_rate * share * number).astype(jnp.int32)
            dropped = jnp.minimum(
                dropped, _size(updates) - number
            )  # No more than there are dead ones.
            live = jax.tree.map(
                lambda m, g: jnp.where(m, jnp.nan_to_num(square(g), posinf=jnp.inf), jnp.nan),
                mask,
                updates,
            )
            stay = _largest(live, number - dropped)
            dead = jax.tree.map(
                lambda m, u: jnp.where(m, jnp.nan, u), mask, rng.uniform_like(use, updates)
            )
            grown = _largest(dead, dropped)
            return jax.tree.map(jnp.logical_or, stay, grown), keep_key

        due = (state.step > 0) & (state.step % every == 0)
        mask, key_left = tree_math.apply_if(due, renew, (state.mask, state.key))
        step = optax.safe_increment(state.step)
        new_state = RandomMaskState(step, key_left, mask, perturbation_state)
        return _apply_mask(mask, displacement), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_sparsity(sparsity: float) -> None:
    checks.check_number("sparsity", sparsity, low=0.0, high=1.0, high_allowed=False)


def _apply_mask(mask: Any, displacement: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda m, d: jnp.where(m, d, jnp.zeros_like(d)), mask, displacement)


def _largest(scores: Any, number: jax.typing.ArrayLike) -> Any:
    """Tree of bools, True at exactly `number` largest scores of the tree; NaN is the least."""
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        return scores
    joined = jnp.concatenate([tree_math.replicate(x).ravel() for x in leaves])
    chosen = _quantile.largest(joined, number)
    return jax.tree.unflatten(structure, tree_math.split(chosen, leaves))


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def empirical_fisher(
    loss_fn: Callable[..., jax.Array], params: optax.Params, *args: Any
) -> optax.Updates:
    r"""Sum over the examples of their squared gradients, for `mask_by_fisher`.

    .. math:: F = \sum_n (\nabla_w \, L(w, x_n))^2

    Args:
      loss_fn: scalar loss of a batch, called as `loss_fn(params, *args)` with batches of one.
      params: the parameters.
      *args: pytrees of arrays with a common leading axis, that of the examples.

    Returns:
      A tree like `params`, in float32 at least.

    Raises:
      ValueError: if `args` is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> x = jnp.array([1.0, 2.0])
      >>> print(flatopt.empirical_fisher(lambda w, x: jnp.mean(w * x), jnp.array(1.0), x))
      5.0

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      One gradient an example, one after the other (`lax.scan`): memory is that of one.
    """
    if not jax.tree.leaves(args):
        raise ValueError("args is empty: pass the batch, whose leading axis numbers the examples.")

    def add(total: Any, example: Any) -> tuple[Any, None]:
        batch = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(loss_fn)(params, *batch)
        return add_squares(total, grads), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, tree_math.scalar_dtype(p)), params)
    return jax.lax.scan(add, zeros, args)[0]


def square(x: jax.Array) -> jax.Array:
    """Squared absolute values, in float32 at least."""
    wide = x.astype(tree_math.accumulator_dtype(x.dtype))
    return (wide.conj() * wide).real


def add_squares(total: Any, grads: Any) -> Any:
    """`total` and the squares of `grads`, in the dtypes of `total`."""
    return jax.tree.map(lambda t, g: t + square(g).astype(t.dtype), total, grads)
