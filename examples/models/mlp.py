"""A plain multilayer perceptron."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      hidden: width of each hidden layer.
      classes: number of outputs.
    """

    hidden: Sequence[int] = (64, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of a batch of flat inputs."""
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)
