"""SAM's gradients from one graph: the model is traced and compiled once, not once a point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks
from flatopt._core.grad_fn import make_grad_fn


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    perturbation: optax.GradientTransformation,
    *,
    num_steps: int | None = None,
    has_aux: bool = False,
    microbatches: int | None = None,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Like `jax.value_and_grad`, but with the gradient at a displaced point.

    .. math::
      (L(w), \; \nabla L(w + \epsilon)), \qquad \epsilon = \epsilon(\nabla L(w))

    The loss and its auxiliary output are those of the clean pass. `gradient_at(perturbation)` in
    the chain gives the same gradient, but the model then stands twice in the compiled program: here
    a loop goes over the points, so that tracing and compiling take about half the time. Choose this
    for large models, and `gradient_at` where a combiner, `start` or `every` is wanted.

    Args:
      loss_fn: scalar loss, called as `loss_fn(params, *args, **kwargs)`.
      perturbation: transformation from a gradient to a displacement, such as `scale_to_norm(rho)`,
        without a state of its own beyond a counter.
      num_steps: ascent steps, >= 1, each with a displacement of its own; None means 1. Static.
      has_aux: whether `loss_fn` returns `(loss, aux)`. Static.
      microbatches: as in `make_grad_fn`. Static.

    Returns:
      A function `value_and_grad(params, *args, step=0, **kwargs)` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`. `step`, the number of the update, is for a perturbation
      whose radius follows a schedule; it does not reach the loss.

    Raises:
      ValueError: if `num_steps` is below 1, or the perturbation keeps more than a counter.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> def loss_fn(w, x):
      ...     return 0.5 * jnp.sum((x * w) ** 2)
      >>> value_and_grad = flatopt.sam_value_and_grad(loss_fn, flatopt.scale_to_norm(0.5))
      >>> w, tx = jnp.array([3.0, 4.0]), optax.sgd(0.1)
      >>> loss, grads = value_and_grad(w, 1.0)  # A plain optimiser takes it from here.
      >>> print(loss, grads)
      12.5 [3.3 4.4]
      >>> updates, opt_state = tx.update(grads, tx.init(w), w)

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Gradient evaluations: `1 + num_steps`, in one loop. Memory: two temporary copies of the
      parameters, and `1 + num_steps` copies of the auxiliary output. On a CPU, XLA runs gradients
      of convolutions in a loop tens of times slower than outside: there, use `gradient_at`.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={loss_fn!r} must be callable as loss_fn(params, *args, **kwargs)."
        )
    checks.check_count("num_steps", num_steps, 1)
    ascents = num_steps or 1
    checks.check_count("microbatches", microbatches, 1)
    perturbation = optax.with_extra_args_support(perturbation)

    def value_and_grad(
        params: optax.Params, *args: Any, step: jax.typing.ArrayLike = 0, **kwargs: Any
    ) -> tuple[Any, optax.Updates]:
        grad_fn = make_grad_fn(loss_fn, *args, has_aux=has_aux, microbatches=microbatches, **kwargs)
        perturbation_state = perturbation.init(params)
        _require_no_memory(perturbation_state)

        def evaluate(point: optax.Params, left: jax.Array) -> tuple[Any, Any]:
            value, grads = grad_fn.value_and_grad(point)
            grads = optax.tree.cast_like(grads, params)
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
    leaves = jax.tree.leaves(state)
    if any(jnp.ndim(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger) for x in leaves):
        raise ValueError(
            "flatopt.sam_value_and_grad is a function and keeps no state, but its perturbation has "
            f"one: {[type(x).__name__ for x in leaves]}. Chain flatopt.gradient_at(perturbation) "
            "before the optimiser instead."
        )
