"""Masks of a displacement that change during training: Fisher, random dynamic, dropout."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _fisher, _quantile, _random, _tree


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
    """State of `mask_at_random` and `drop_displacement`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      key: uint32 key data.
      mask: tree of bools shaped like the parameters; empty for `drop_displacement`.
      perturbation_state: state of the masked perturbation; empty for `drop_displacement`.
    """

    step: jax.Array
    key: jax.Array
    mask: Any
    perturbation_state: optax.OptState


def mask_by_fisher(
    perturbation: optax.GradientTransformation, sparsity: float, every: int
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
    _checks.check_count("every", every, 1)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> FisherMaskState:
        return FisherMaskState(
            step=jnp.zeros([], jnp.int32),
            mask=jax.tree.map(lambda p: jnp.zeros_like(p, bool), params),
            fisher=jax.tree.map(lambda p: jnp.zeros_like(p, _tree.scalar_dtype(p)), params),
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
            fisher = _fisher.add_squares(state.fisher, updates)
            finite = jnp.isfinite(_tree.norm(updates))
            fisher = optax.tree.where(finite, fisher, state.fisher)

        def renew(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            _, fisher = carry
            number = round((1 - sparsity) * _size(fisher))
            return _largest(fisher, number), optax.tree.zeros_like(fisher)

        carry = (state.mask, optax.tree.cast_like(fisher, state.fisher))
        mask, fisher = _tree.apply_if(state.step % every == 0, renew, carry)
        step = optax.safe_increment(state.step)
        new_state = FisherMaskState(step, mask, fisher, perturbation_state)
        return _apply_mask(mask, displacement), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mask_at_random(
    perturbation: optax.GradientTransformation,
    sparsity: float,
    every: int,
    drop_rate: float = 0.5,
    decay_steps: int | None = None,
    key: _random.KeyLike = 0,
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
    _checks.check_count("every", every, 1)
    _checks.check_count("decay_steps", decay_steps, 1)
    _checks.check_number("drop_rate", drop_rate, low=0.0, high=1.0)
    perturbation = optax.with_extra_args_support(perturbation)
    data = _random.key_data(key)

    def init_fn(params: optax.Params) -> RandomMaskState:
        keep, use = _random.split(data)
        number = round((1 - sparsity) * _size(params))
        return RandomMaskState(
            step=jnp.zeros([], jnp.int32),
            key=keep,
            mask=_largest(_random.uniform_like(use, params), number),
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
            keep_key, use = _random.split(key)
            share: jax.typing.ArrayLike = 1.0
            if decay_steps is not None:
                progress = jnp.minimum(state.step / decay_steps, 1.0)
                share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            dropped = jnp.round(drop_rate * share * number).astype(jnp.int32)
            dropped = jnp.minimum(dropped, _size(updates) - number)  # As many must be dead.
            live = jax.tree.map(
                lambda m, g: jnp.where(
                    m, jnp.nan_to_num(_fisher.square(g), posinf=jnp.inf), jnp.nan
                ),
                mask,
                updates,
            )
            stay = _largest(live, number - dropped)
            dead = jax.tree.map(
                lambda m, u: jnp.where(m, jnp.nan, u), mask, _random.uniform_like(use, updates)
            )
            grown = _largest(dead, dropped)
            return jax.tree.map(jnp.logical_or, stay, grown), keep_key

        due = (state.step > 0) & (state.step % every == 0)
        mask, key_left = _tree.apply_if(due, renew, (state.mask, state.key))
        step = optax.safe_increment(state.step)
        new_state = RandomMaskState(step, key_left, mask, perturbation_state)
        return _apply_mask(mask, displacement), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def drop_displacement(
    keep: float, key: _random.KeyLike = 0, per_tensor: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Drops random entries of the displacement and scales up the rest: ESAM's weight perturbation.

    .. math:: \epsilon_i \leftarrow m_i \, \epsilon_i / \beta, \qquad P(m_i = 1) = \beta

    Args:
      keep: :math:`\beta`, in (0, 1]. Static where it is a number.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      per_tensor: True draws once for each leaf, as the authors' code does; False for each weight,
        as in their paper. Static.

    Returns:
      A transformation to be chained after `scale_to_norm`, anew at each displacement.

    Raises:
      ValueError: if `keep` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> drop = flatopt.drop_displacement(keep=0.5, key=0)
      >>> displacement, _ = drop.update(jnp.ones(1000), drop.init(jnp.ones(1000)))
      >>> print(displacement.max(), bool(abs(displacement.mean() - 1) < 0.1))
      2.0 True

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      Gradient evaluations: none of its own; none saved either. State: one key, one integer.
    """
    _checks.check_number("keep", keep, low=0.0, high=1.0)
    if _checks.is_zero(keep):
        raise ValueError("keep=0 is out of range: it must be in (0, 1].")
    data = _random.key_data(key)

    def init_fn(params: optax.Params) -> RandomMaskState:
        del params
        return RandomMaskState(jnp.zeros([], jnp.int32), jnp.array(data), (), ())

    def update_fn(
        updates: optax.Updates,
        state: RandomMaskState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomMaskState]:
        del params, extra_args
        left, use = _random.split(state.key)

        like = jax.tree.map(lambda _: jnp.zeros([]), updates) if per_tensor else updates
        dropped = jax.tree.map(
            lambda x, u: jnp.where(u < keep, x / keep, 0).astype(x.dtype),
            updates,
            _random.uniform_like(use, like),
        )
        return dropped, RandomMaskState(optax.safe_increment(state.step), left, (), ())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_sparsity(sparsity: float) -> None:
    _checks.check_number("sparsity", sparsity, low=0.0, high=1.0, high_allowed=False)


def _apply_mask(mask: Any, displacement: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda m, d: jnp.where(m, d, jnp.zeros_like(d)), mask, displacement)


def _largest(scores: Any, number: jax.typing.ArrayLike) -> Any:
    """Tree of bools, True at exactly `number` largest scores of the tree; NaN is the least."""
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        return scores
    joined = jnp.concatenate([_tree.replicate(x).ravel() for x in leaves])
    chosen = _quantile.largest(joined, number)
    return jax.tree.unflatten(structure, _tree.split(chosen, leaves))


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
