"""A small convolutional network."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class CNN(nn.Module):
    """Blocks of convolution, BatchNorm, ReLU and 2x2 pooling, then dropout and a dense layer.

    Attributes:
      channels: width of each block; each halves the image.
      classes: number of outputs.
      dropout: share of features dropped before the last layer in training.
    """

    channels: Sequence[int] = (16, 32)
    classes: int = 10
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images [batch, height, width, channels].

        With `train`, BatchNorm uses and updates the batch's statistics (`mutable=["batch_stats"]`),
        and dropout needs `rngs={"dropout": key}`.
        """
        for width in self.channels:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, (1, 2)))
        return nn.Dense(self.classes)(x)
