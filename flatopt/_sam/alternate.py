"""SAM (Foret et al., arXiv:2010.01412) for loops that take one gradient at a time.

Two calls of `update` make one step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math


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


def way_to(target: Any, params: Any, updates: Any) -> optax.Updates:
    """`target - params` in the dtypes of `updates`, which hold the parameters' numbers.

    The difference of two near numbers is exact: the caller's sum gives `target` again.
    """
    return tree_math.on_inexact(lambda _, t, p: t - p, updates, target, params)


@registry.method("wrapper")
def alternate(
    optimizer: optax.GradientTransformation, perturbation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""SAM without `grad_fn`, for loops that cannot pass a function: one gradient a call.

    .. math:: w' = w + \epsilon(\nabla L(w)), \; \text{ next call: } \; w_+ = w + u(\nabla L(w'), w)

    Args:
      optimizer: any optax transformation u. It runs in second calls only, and sees the clean w.
      perturbation: from a gradient to a displacement, such as `scale_to_norm(rho)`; it is given the
        clean w, and `step=`, the number of the pair.

    Returns:
      A wrapper to be outermost; `update` needs `params`. Between the calls of a pair,
      `flatopt.eval_params(opt_state, params)` is the clean point.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.alternate(optax.sgd(0.1), flatopt.scale_to_norm(0.5))
      >>> opt_state, w = tx.init(jnp.zeros(2)), jnp.array([3.0, 4.0])
      >>> for _ in range(2):  # The gradient of |w|^2 / 2 is w.
      ...     updates, opt_state = tx.update(w, opt_state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(w, flatopt.eval_params(opt_state, w))
      [3.3 4.4] [3. 4.]
      [2.67 3.56] [2.67 3.56]

    Cost: 0 extra gradients, but 2 calls a step; 1 copy.
    """
    optimizer = checks.as_transformation("optimizer", optimizer)
    perturbation = checks.as_transformation("perturbation", perturbation)

    def init_fn(params: optax.Params) -> AlternateState:
        step, perturbed = jnp.zeros([], jnp.int32), jnp.zeros([], bool)
        clean = optax.tree.zeros_like(params)
        states = perturbation.init(params), optimizer.init(params)
        return AlternateState(step, perturbed, clean, *states)

    def update_fn(
        updates: Any, state: AlternateState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, AlternateState]:
        checks.require_params("alternate", params)

        def leave(carry: tuple[optax.Updates, AlternateState]) -> Any:
            moves, state = carry
            grads = tree_math.cast_like(moves, updates)
            kwargs = extra_args | {"step": state.step}
            moves, ascent = perturbation.update(grads, state.perturbation_state, params, **kwargs)
            return moves, state._replace(clean=params, perturbation_state=ascent)

        def come_back(carry: tuple[optax.Updates, AlternateState]) -> Any:
            wide, state = carry
            grads = tree_math.cast_like(wide, updates)
            moves, inner = optimizer.update(grads, state.inner_state, state.clean, **extra_args)
            target = optax.apply_updates(state.clean, moves)
            step = optax.safe_increment(state.step)
            return way_to(target, params, wide), state._replace(step=step, inner_state=inner)

        wide = tree_math.widened(updates, params)
        carry = tree_math.apply_if(state.perturbed, come_back, (wide, state))
        moves, new = tree_math.apply_if(~state.perturbed, leave, carry)
        return moves, new._replace(perturbed=~state.perturbed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
