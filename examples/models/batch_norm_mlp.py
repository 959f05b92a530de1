"""A multilayer perceptron with BatchNorm."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class BatchNormMLP(nn.Module):
    """Dense layers with BatchNorm and ReLU between them.

    Attributes:
      hidden: width of each hidden layer.
      classes: number of outputs.
      momentum: of the running statistics: 0.9 forgets a batch within ten or so.
    """

    hidden: Sequence[int] = (64, 64)
    classes: int = 10
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of a batch of flat inputs."""
        for width in self.hidden:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        return nn.Dense(self.classes)(x)
