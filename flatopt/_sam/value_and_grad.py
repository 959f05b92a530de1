"""SAM (Foret et al., arXiv:2010.01412) from one graph: the model is traced and compiled once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, stage, tree_math
from flatopt._core.grad_fn import make_grad_fn


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    num_steps: int | None = None,
    has_aux: bool = False,
    microbatches: int | None = None,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Like `jax.value_and_grad`, with the gradient at a displaced point and the model traced once.

    .. math:: (L(w), \; \nabla L(w + \epsilon)), \qquad \epsilon = \epsilon(\nabla L(w))

    Args:
      loss_fn: scalar loss, called as `loss_fn(params, *args, **kwargs)`.
      perturbation: such as `scale_to_norm(rho)`; it must keep no state but a counter.
      num_steps: see `gradient_at`, which gives the same gradient with the model compiled twice.
      has_aux, microbatches: see `make_grad_fn`; the auxiliary output is that of the clean pass.

    Returns:
      A function `value_and_grad(params, *args, step=0, **kwargs)` that returns `(loss, grads)`, or
      `((loss, aux), grads)`. `step`, the number of the update, is for schedules of the radius.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> value_and_grad = flatopt.sam_value_and_grad(
      ...     lambda w, x: 0.5 * jnp.sum((x * w) ** 2), flatopt.scale_to_norm(0.5))
      >>> print(*value_and_grad(jnp.array([3.0, 4.0]), 1.0))
      12.5 [3.3 4.4]

    References:
      Foret et al. Sharpness-Aware Minimization. arXiv:2010.01412

    Cost: `1 + num_steps` gradients in one loop; 0 copies (+2 temporary).
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={loss_fn!r} must be callable as loss_fn(params, *args, **kwargs)."
        )
    checks.check_count("num_steps", num_steps, 1)
    ascents = num_steps or 1
    checks.check_count("microbatches", microbatches, 1)
    perturbation = checks.as_transformation("perturbation", perturbation)

    def value_and_grad(
        params: optax.Params, *args: Any, step: jax.typing.ArrayLike = 0, **kwargs: Any
    ) -> tuple[Any, optax.Updates]:
        grad_fn = make_grad_fn(loss_fn, *args, has_aux=has_aux, microbatches=microbatches, **kwargs)
        perturbation_state = perturbation.init(params)
        _require_no_memory(perturbation_state)

        def evaluate(point: optax.Params, left: jax.Array) -> tuple[Any, Any]:
            value, grads = grad_fn.value_and_grad(point)
            grads = tree_math.cast_like(grads, params)
            displacement, _ = perturbation.update(grads, perturbation_state, params, step=step)
            # The first ascent begins at `params`: the carried point need not outlive its gradient.
            start = params if ascents == 1 else point
            point = optax.apply_updates(start, displacement)
            # The last gradient leaves in the memory of the points: no copy of it, nor one for it.
            return optax.tree.where(left > 0, point, grads), value

        grads, values = jax.lax.scan(evaluate, params, jnp.arange(ascents, -1, -1))
        return jax.tree.map(lambda value: value[0], values), grads

    return value_and_grad


def _require_no_memory(state: optax.OptState) -> None:
    """Raises unless `state` holds counters alone: a function has nowhere to keep the rest."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, stage.StepState))
    others = [x for x in leaves if not isinstance(x, stage.StepState)]
    if any(jnp.ndim(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger) for x in others):
        raise ValueError(
            "flatopt.sam_value_and_grad is a function and keeps no state, but its perturbation has "
            f"one: {[type(x).__name__ for x in others]}. Chain flatopt.gradient_at(perturbation) "
            "before the optimiser instead."
        )
