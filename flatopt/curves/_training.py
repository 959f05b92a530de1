"""Training of curves with any optax optimiser."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt._core import progress as _progress
from flatopt.curves._bases import Basis, bezier
from flatopt.curves._points import point


def curve_loss(
    loss_fn: _batches.LossFn, basis: Basis = bezier, weight_decay: float = 0.0
) -> Callable[..., jax.Array]:
    r"""The loss at a point of a curve, as a function of its control points.

    .. math:: L(w(t)) + \tfrac12 \, weight\_decay \, \|w(t)\|^2

    Args:
      loss_fn: scalar loss of one network, `loss_fn(params, *args, **kwargs)`.
      basis: `bezier`, `polychain` or another. Static.
      weight_decay: strength of the decay of the curve's points, >= 0. Decay of the control points
        themselves would straighten the curve instead.

    Returns:
      `loss(controls, position, *args, **kwargs)`. Draw a position for every step, uniformly from
      [0, 1], and train with any optimiser in `keep_fixed`.

    Examples:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> loss = flatopt.curves.curve_loss(lambda w: w**2)
      >>> print(jax.grad(loss)(jnp.array([0.0, 2.0, 0.0]), 0.5))
      [0.5 1.  0.5]

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Cost: 1 loss.
    """
    checks.check_number("weight_decay", weight_decay, low=0.0)

    def loss(
        controls: optax.Params, position: jax.typing.ArrayLike, *args: Any, **kwargs: Any
    ) -> jax.Array:
        params = point(controls, position, basis)
        value = loss_fn(params, *args, **kwargs)
        if checks.is_number(weight_decay, 0):
            return value
        return value + 0.5 * weight_decay * tree_math.vdot(params, params)

    return loss


def keep_fixed(
    optimizer: optax.GradientTransformation, indices: Sequence[int] = (0, -1)
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps some control points where they are.

    .. math:: u_j \leftarrow 0

    Args:
      optimizer: any optax transformation, for all control points together.
      indices: numbers of the control points to keep: `fixed_points(...)`. Static.

    Returns:
      A wrapper, outermost: these points' gradients are zero for `optimizer`, and so are their
      updates, whatever momentum or weight decay would make of them.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flatopt import curves
      >>> tx = curves.keep_fixed(optax.sgd(1.0))
      >>> controls = jnp.array([0.0, 2.0, 0.0])
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(controls), controls)
      >>> print(updates)
      [ 0. -1.  0.]

    Cost: 0 extra gradients; 0 copies.
    """

    def clear(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.at[jnp.array(indices)].set(0), tree)

    inner = checks.as_transformation("optimizer", optimizer)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if "grad_fn" in extra_args:  # SAM must not move the ends either.
            grad_fn = extra_args["grad_fn"]
            extra_args["grad_fn"] = lambda point, i: clear(grad_fn(point, i))
        updates, state = inner.update(clear(updates), state, params, **extra_args)
        return clear(updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def train(
    loss_fn: _batches.LossFn,
    controls: optax.Params,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    basis: Basis = bezier,
    weight_decay: float = 0.0,
    key: jax.typing.ArrayLike = 0,
    fixed: Sequence[int] = (0, -1),
    progress: bool = False,
) -> optax.Params:
    """Trains a curve: one step a batch, each at a position drawn from [0, 1].

    Args:
      loss_fn: scalar loss of one network, `loss_fn(params, batch)`. Static.
      controls, fixed: `control_points(...)`, and the numbers of those that do not move (static).
      optimizer: any optax transformation; `flatopt.sam` and its like get their `grad_fn`.
      batches, progress: the batches, one a step; whether to show a progress bar (needs tqdm).
      basis, weight_decay: the curve, and the decay of its points; see `curve_loss`.
      key: random key or integer seed of the positions.

    Returns:
      The trained control points.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> loss_fn = lambda w, batch: (jnp.sum(w**2) - 1) ** 2  # Zero on a circle.
      >>> controls = flatopt.curves.control_points(list(jnp.eye(2)))
      >>> controls = flatopt.curves.train(loss_fn, controls, optax.sgd(0.5), [None] * 300)
      >>> print(f"{jnp.linalg.norm(flatopt.curves.point(controls, 0.5)):.2f}")
      1.01

    References:
      As for `bezier`.

    Cost: 1 gradient a batch.
    """
    loss = curve_loss(loss_fn, basis, weight_decay)
    tx = keep_fixed(optimizer, fixed)

    @jax.jit
    def step(controls: Any, opt_state: Any, key: jax.Array, batch: Any) -> tuple[Any, Any]:
        position = jax.random.uniform(key)

        def grad_fn(controls: Any, i: jax.typing.ArrayLike) -> Any:
            del i
            return jax.grad(loss)(controls, position, batch)

        updates, opt_state = tx.update(grad_fn(controls, 0), opt_state, controls, grad_fn=grad_fn)
        return optax.apply_updates(controls, updates), opt_state

    opt_state = tx.init(controls)
    random_key = rng.as_key(key)
    for number, batch in enumerate(_progress.bar(batches, "curve", progress)):
        controls, opt_state = step(
            controls, opt_state, jax.random.fold_in(random_key, number), batch
        )
    return controls
