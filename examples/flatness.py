"""Two views of flatness: the top eigenvalue of the Hessian, and the loss along random lines."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any], jax.Array]


def top_eigenvalue(loss: Loss, params: Any, key: jax.Array, iterations: int = 40) -> jax.Array:
    """The largest eigenvalue of the Hessian of `loss` at `params`, by power iteration.

    Power iteration finds the eigenvalue of largest absolute value. Should that be negative, a
    second round on the Hessian shifted by it finds the largest one.

    Args:
      loss: function of the parameters alone.
      params: where to take the Hessian.
      key: for the start vectors.
      iterations: Hessian-vector products in each of the two rounds.
    """

    def product(vector: Any) -> Any:
        return jax.jvp(jax.grad(loss), (params,), (vector,))[1]

    def power(start: Any, shift: jax.Array) -> tuple[Any, jax.Array]:
        def iterate(vector: Any, _: None) -> tuple[Any, jax.Array]:
            shifted = optax.tree.add_scale(product(vector), shift, vector)
            # The Rayleigh quotient of the unit vector that went in.
            return _unit(shifted), optax.tree.vdot(vector, shifted) - shift

        vector, values = jax.lax.scan(iterate, _unit(start), length=iterations)
        return vector, values[-1]

    first, second = (
        optax.tree.random_like(k, params, jax.random.normal) for k in jax.random.split(key)
    )
    vector, dominant = power(first, jnp.zeros(()))
    # Start again from what was found, plus noise: it may be the eigenvector shifted to zero.
    return power(optax.tree.add(vector, _unit(second)), jnp.maximum(-dominant, 0.0))[1]


def _unit(tree: Any) -> Any:
    """`tree` divided by its norm; zero stays zero."""
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(tree), 1e-30), tree)


def filter_normalised_direction(key: jax.Array, params: Any) -> Any:
    """A random direction in which each filter is as long as that filter of `params`.

    A filter is what leads to one output unit: in Flax the last axis of a kernel counts them.
    Vectors and scalars (biases, scales of normalisation layers) do not move. See Li, Xu, Taylor,
    Studer, Goldstein, Visualizing the Loss Landscape of Neural Nets, arXiv:1712.09913.
    """

    def leaf(direction: jax.Array, param: jax.Array) -> jax.Array:
        if param.ndim < 2:
            return jnp.zeros_like(param)
        axes = tuple(range(param.ndim - 1))
        lengths = [jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (param, direction)]
        return direction * (lengths[0] / lengths[1])

    noise = optax.tree.random_like(key, params, jax.random.normal)
    return jax.tree.map(leaf, noise, params)


def loss_along_lines(
    loss: Loss, params: Any, key: jax.Array, positions: jax.Array, directions: int
) -> jax.Array:
    """The loss at `params + position * direction`, averaged over random directions.

    The same key gives the same noise for every method; only the lengths follow the parameters.

    Returns:
      An array like `positions`.
    """

    def one_direction(key: jax.Array) -> jax.Array:
        direction = filter_normalised_direction(key, params)
        return jax.lax.map(
            lambda position: loss(optax.tree.add_scale(params, position, direction)), positions
        )

    return jnp.mean(jax.lax.map(one_direction, jax.random.split(key, directions)), axis=0)
