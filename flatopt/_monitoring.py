"""Stages that watch: they pass updates through and keep a number about them in their state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, momenta, tree_math
from flatopt._core.eval_params import eval_params


class GradientNormState(NamedTuple):
    """State of `record_gradient_norm`.

    Attributes:
      gradient_norm: norm of the last gradient, 0 before the first.
    """

    gradient_norm: jax.Array


class SharpnessState(NamedTuple):
    """State of `record_sharpness`.

    Attributes:
      step: int32 scalar, number of perturbed updates so far.
      sharpness: of the last perturbed update, 0 before the first.
      perturbation_state: state of the perturbation.
      combiner_state: state of the combiner, `optax.EmptyState()` without one.
    """

    step: jax.Array
    sharpness: jax.Array
    perturbation_state: optax.OptState
    combiner_state: optax.OptState


class DistanceState(NamedTuple):
    """State of `record_distance`.

    Attributes:
      distance: of the last weights from the average, 0 before there is one.
      average_state: state of the averaging stage.
    """

    distance: jax.Array
    average_state: optax.OptState


class CosineState(NamedTuple):
    """State of `record_cosine`.

    Attributes:
      cosine: of the angle between the last gradient and the momentum before it, 0 before the first.
      inner_state: state of the optimiser.
    """

    cosine: jax.Array
    inner_state: optax.OptState


def record_gradient_norm() -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of what passes: of the gradient, or of what the chain has made of it so far.

    .. math:: \|g\|

    Returns:
      A stage that passes updates through. Read `optax.tree.get(opt_state, "gradient_norm")`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.record_gradient_norm(), optax.sgd(0.1))
      >>> params = jnp.zeros(2)
      >>> _, opt_state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
      >>> print(optax.tree.get(opt_state, "gradient_norm"))
      5.0

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Notes:
      Place: first, for the clean gradient; after `sam`, for the perturbed one. Gradient
      evaluations: none. State: one scalar. Unlike `optax.snapshot` with a norm it sums in
      float32 at least.
    """

    def init_fn(params: optax.Params) -> GradientNormState:
        return GradientNormState(jnp.zeros([], tree_math.scalar_dtype(params)))

    def update_fn(
        updates: optax.Updates,
        state: GradientNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientNormState]:
        del params, extra_args
        return updates, GradientNormState(tree_math.norm(updates).astype(state.gradient_norm.dtype))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def record_sharpness(
    perturbation: optax.GradientTransformation,
    combiner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps SAM's sharpness, from the two gradients that SAM has anyway.

    .. math:: L(w + \epsilon) - L(w) \approx \tfrac12 \, \epsilon \cdot
       \big( \nabla L(w) + \nabla L(w + \epsilon) \big)

    which is exact on a quadratic.

    Args:
      perturbation: the perturbation of the `gradient_at` in which this stands as combiner.
      combiner: what to combine the gradients with besides; None: nothing. Static.

    Returns:
      A combiner that passes the perturbed gradient through, or what `combiner` makes of it. Read
      `optax.tree.get(opt_state, "sharpness")`.

    Raises:
      ValueError: in use, if it does not stand as a combiner.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> ascent = flatopt.scale_to_norm(0.1)
      >>> stage = flatopt.gradient_at(ascent, combiner=flatopt.record_sharpness(ascent))
      >>> tx = optax.chain(stage, optax.sgd(0.1))
      >>> w = jnp.array([3.0, 4.0])
      >>> _, opt_state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.tree.get(opt_state, 'sharpness'):.4f}")  # (5.1^2 - 5^2) / 2
      0.5050

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Place: `gradient_at(perturbation, combiner=record_sharpness(perturbation))`, one step of
      ascent. On minibatches it is the sharpness of the batch. The displacement is computed a second
      time, from the clean gradient; a schedule of its radius counts perturbed updates. Gradient
      evaluations: none extra. State: two scalars and a second state of the perturbation.
    """
    perturbation = optax.with_extra_args_support(perturbation)
    inner = optax.with_extra_args_support(combiner or optax.identity())

    def init_fn(params: optax.Params) -> SharpnessState:
        return SharpnessState(
            step=jnp.zeros([], jnp.int32),
            sharpness=jnp.zeros([], tree_math.scalar_dtype(params)),
            perturbation_state=perturbation.init(params),
            combiner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: SharpnessState,
        params: optax.Params | None = None,
        *,
        clean_updates: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessState]:
        if clean_updates is None:
            raise ValueError(
                "flatopt.record_sharpness compares two gradients, and has only one here. Use it as "
                "combiner: flatopt.gradient_at(perturbation, "
                "combiner=flatopt.record_sharpness(perturbation))."
            )
        displacement, perturbation_state = perturbation.update(
            clean_updates, state.perturbation_state, params, **{**extra_args, "step": state.step}
        )
        rise = (
            tree_math.vdot(displacement, clean_updates) + tree_math.vdot(displacement, updates)
        ) / 2
        updates, combiner_state = inner.update(
            updates, state.combiner_state, params, clean_updates=clean_updates, **extra_args
        )
        return updates, SharpnessState(
            optax.safe_increment(state.step),
            rise.astype(state.sharpness.dtype),
            perturbation_state,
            combiner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def record_distance(
    average: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the distance of the weights from their average.

    .. math:: \|w_t - \bar w_t\|

    Args:
      average: an averaging stage: `swa(...)`, `params_ema(...)`.

    Returns:
      A stage that does what `average` does, and `eval_params` finds the average in it. Read
      `optax.tree.get(opt_state, "distance")`.

    Raises:
      ValueError: if `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.record_distance(flatopt.swa()))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3, their mean is 2
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(opt_state, "distance"))
      1.0

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      Place: last in its chain, as `average`. A distance that no longer grows says that the weights
      wander around one place, and that averaging is under way. Gradient evaluations: none. State:
      that of `average` and one scalar.
    """
    average = optax.with_extra_args_support(average)

    def init_fn(params: optax.Params) -> DistanceState:
        return DistanceState(jnp.zeros([], tree_math.scalar_dtype(params)), average.init(params))

    def update_fn(
        updates: optax.Updates,
        state: DistanceState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DistanceState]:
        checks.require_params("record_distance", params)
        updates, average_state = average.update(updates, state.average_state, params, **extra_args)
        reached = optax.apply_updates(params, updates)
        apart = jax.tree.map(jnp.subtract, reached, eval_params(average_state, reached))
        return updates, DistanceState(
            tree_math.norm(apart).astype(state.distance.dtype), average_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def record_cosine(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the cosine of the angle between the gradient and the momentum that meets it.

    .. math:: \cos \angle (m_{t-1}, g_t) = \frac{m_{t-1} \cdot g_t}{\|m_{t-1}\| \, \|g_t\|}

    Args:
      optimizer: an optimiser with momentum, such as `optax.sgd(learning_rate, momentum=0.9)` or
        `optax.adam`; its state holds one tree called `trace` or `mu`.

    Returns:
      A wrapper that does what `optimizer` does. Read `optax.tree.get(opt_state, "cosine")`.

    Raises:
      ValueError: if `optimizer` has no momentum or several.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.record_cosine(optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.zeros(2)
      >>> opt_state = tx.init(params)
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])):
      ...     _, opt_state = tx.update(grads, opt_state, params)
      >>> print(f"{optax.tree.get(opt_state, 'cosine'):.1f}")
      0.6

    References:
      Becker, Altrock, Risse. Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead. arXiv:2401.12033

    Notes:
      Place: around the optimiser that has the momentum, inside a chain or outermost. Momentum-SAM
      takes the momentum for a gradient: a cosine far below 1 says how rough that is. Gradient
      evaluations: none. State: that of `optimizer` and one scalar.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> CosineState:
        inner_state = optimizer.init(params)
        momenta.find_first(inner_state, params, "record_cosine")
        return CosineState(jnp.zeros([], tree_math.scalar_dtype(params)), inner_state)

    def update_fn(
        updates: optax.Updates,
        state: CosineState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CosineState]:
        momentum = momenta.find_first(state.inner_state, updates, "record_cosine")
        # Apart, so that the product of two small norms does not vanish in half precision.
        lengths = [tree_math.norm(tree) + tree_math.EPSILON for tree in (momentum, updates)]
        cosine = tree_math.vdot(momentum, updates) / lengths[0] / lengths[1]
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        return updates, CosineState(cosine.astype(state.cosine.dtype), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
