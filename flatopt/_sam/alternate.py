"""SAM for loops that take one gradient at a time: two calls of `update` make one step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math


class AlternateState(NamedTuple):
    """State of `alternate`.

    Attributes:
      step: int32 scalar, number of whole steps so far.
      perturbed: bool scalar, whether the parameters stand at the displaced point.
      clean: tree like the parameters: the point to return to; of no meaning unless `perturbed`.
      perturbation_state: state of the perturbation.
      inner_state: state of the wrapped optimiser.
    """

    step: jax.Array
    perturbed: jax.Array
    clean: optax.Params
    perturbation_state: optax.OptState
    inner_state: optax.OptState

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the clean point: `params` themselves, unless they are displaced."""

        def leaf(param: jax.Array, clean: Any) -> jax.Array:
            return param if tree_math.is_masked(clean) else jnp.where(self.perturbed, clean, param)

        return jax.tree.map(leaf, params, tree_math.merge_masked([self.clean], params))


def alternate(
    optimizer: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""SAM without `grad_fn`, for loops that cannot pass a function: one gradient a call.

    .. math::
      \text{first call:} \quad & w' = w + \epsilon(\nabla L(w)) \\
      \text{second call:} \quad & w_+ = w + u(\nabla L(w'), w)

    The first call of a pair moves the parameters to the displaced point; the loop takes its next
    gradient there. The second brings them back and does the step of `optimizer`. Given the same
    batch twice, a pair is one step of `optax.chain(flatopt.gradient_at(perturbation), optimizer)`.

    Args:
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`;
        it is given the clean parameters, and `step=`, the number of the pair.
      optimizer: any optax transformation. It runs in second calls only, so that its schedules and
        counters count whole steps; it is shown the clean parameters as `params`.

    Returns:
      A wrapper to be outermost. `update` needs `params`. Between the calls of a pair,
      `flatopt.eval_params(opt_state, params)` is the clean point.

    Raises:
      ValueError: if `params` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.alternate(optax.sgd(0.1), flatopt.scale_to_norm(0.5))
      >>> params = jnp.array([3.0, 4.0])
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     grads = jax.grad(lambda w: 0.5 * jnp.sum(w**2))(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, flatopt.eval_params(opt_state, params))
      [3.3 4.4] [3. 4.]
      [2.67 3.56] [2.67 3.56]

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Place: outermost, with clipping, decay and averages inside; what stands before it sees both
      gradients. The loop decides which batches make a pair: each batch twice is SAM; a fresh batch
      every call is another, noisier method that takes half as many steps. Losses reported in second
      calls, and a `value=` handed over there, are those of the displaced point. Around it,
      `optax.MultiSteps(alternate(...), k)` is SAM on the mean of k batches if they come twice, and
      `optax.apply_if_finite` leaves out a call whose gradient is not finite: the half that is
      missing is done by the next call. Gradient evaluations: none of its own; two calls a step.
      State: one copy of the parameters besides the inner states. It holds the clean point, not the
      displacement, so the way back has one rounding and loses nothing however large the
      displacement.
    """
    perturbation = optax.with_extra_args_support(perturbation)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> AlternateState:
        return AlternateState(
            step=jnp.zeros([], jnp.int32),
            perturbed=jnp.zeros([], bool),
            clean=optax.tree.zeros_like(params),
            perturbation_state=perturbation.init(params),
            inner_state=optimizer.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: AlternateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlternateState]:
        checks.require_params("alternate", params)

        def leave(carry: tuple[optax.Updates, AlternateState]) -> Any:
            updates, state = carry
            displacement, perturbation_state = perturbation.update(
                updates, state.perturbation_state, params, **{**extra_args, "step": state.step}
            )
            return optax.tree.cast_like(displacement, updates), state._replace(
                perturbed=jnp.ones([], bool), clean=params, perturbation_state=perturbation_state
            )

        def come_back(carry: tuple[optax.Updates, AlternateState]) -> Any:
            updates, state = carry
            inner_updates, inner_state = optimizer.update(
                updates, state.inner_state, state.clean, **extra_args
            )
            # The difference of two near numbers is exact: the caller's sum gives `target` again.
            target = optax.apply_updates(state.clean, inner_updates)
            moves = jax.tree.map(lambda t, p, u: (t - p).astype(u.dtype), target, params, updates)
            return moves, state._replace(
                step=optax.safe_increment(state.step),
                perturbed=jnp.zeros([], bool),
                inner_state=inner_state,
            )

        carry = tree_math.apply_if(state.perturbed, come_back, (updates, state))
        return tree_math.apply_if(~state.perturbed, leave, carry)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
