"""A graph convolutional network on a dense adjacency matrix."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class GCN(nn.Module):
    """Layers that average over neighbours, then mix features; ReLU between them.

    Kipf, Welling, Semi-Supervised Classification with Graph Convolutional Networks,
    arXiv:1609.02907.

    Attributes:
      hidden: width of each hidden layer.
      classes: number of outputs.
      dropout: share of features dropped before each layer in training.
    """

    hidden: Sequence[int] = (16,)
    classes: int = 7
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, propagate: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of every node.

        Args:
          x: features [nodes, features].
          propagate: `normalised_adjacency(...)`, [nodes, nodes].
          train: whether to drop features; needs `rngs={"dropout": key}`.
        """
        for width in self.hidden:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(propagate @ nn.Dense(width, use_bias=False)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return propagate @ nn.Dense(self.classes, use_bias=False)(x)


def normalised_adjacency(adjacency: jax.Array) -> jax.Array:
    r"""The matrix by which a layer averages over neighbours and the node itself.

    .. math:: D^{-1/2} (A + I) D^{-1/2}, \qquad D = \mathrm{diag}((A + I) 1)

    Args:
      adjacency: symmetric, zeros and ones, [nodes, nodes]; its diagonal does not matter.
    """
    number = len(adjacency)
    joined = jnp.where(jnp.eye(number, dtype=bool), 1.0, adjacency)
    root = jax.lax.rsqrt(jnp.sum(joined, axis=1))
    return root[:, None] * joined * root[None, :]
