"""Rises of the loss under random Gaussian noise on the weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import batches as _batches
from flatopt.measures import _basis
from flatopt.measures._variables import Variables, Vector


@dataclasses.dataclass(frozen=True)
class Rises:
    """Rise of the loss for each draw and each size: [draws, sizes], and the loss itself.

    Sizes are [sizes] for all entries, or one such array a leaf, with further axes or none.
    """

    loss_fn: _batches.LossFn
    variables: Variables
    num_samples: int
    multiplicative: bool = False

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        sigmas: jax.Array | Vector,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        losses, loss = self.losses(mean, loops, params, sigmas, key)
        return losses - loss, loss

    def losses(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        sigmas: jax.Array | Vector,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The losses themselves, in place of their rises."""
        point = self.variables.take(params)

        def loss_at(vector: Vector) -> jax.Array:
            return mean(_batches.Call(self.loss_fn), self.variables.put(params, vector))

        loss = loss_at(point)

        def one_draw(sample_key: jax.Array) -> jax.Array:
            # The same draw for every size: the curve is smoother than its standard errors.
            noise = _basis.random_normal(sample_key, point)
            if self.multiplicative:
                noise = jax.tree.map(jnp.multiply, point, noise)

            def at(sigma: Vector) -> jax.Array:
                moved = jax.tree.map(lambda w, s, z: w + s.astype(w.dtype) * z, point, sigma, noise)
                return loss_at(moved)

            return loops.map(at, sigmas if isinstance(sigmas, tuple) else (sigmas,) * len(point))

        return loops.map(one_draw, jax.random.split(key, self.num_samples)), loss
