"""A small Transformer in Flax nnx, for images and for text."""

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02  # Of position embeddings and token embeddings.


class Transformer(nnx.Module):
    """Pre-LayerNorm Transformer blocks over learned position embeddings."""

    def __init__(
        self, length: int, width: int, heads: int, layers: int, dropout: float, rngs: nnx.Rngs
    ):
        """Makes the blocks.

        Args:
          length: longest sequence.
          width: features of each position.
          heads: attention heads; must divide `width`.
          layers: number of blocks.
          dropout: share of attention weights and of features dropped in training.
          rngs: streams "params" and "dropout".
        """
        normal = jax.random.normal(rngs.params(), (length, width))
        self.positions = nnx.Param(INIT_STD * normal)
        self.blocks = nnx.List([_Block(width, heads, dropout, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array, causal: bool = False) -> jax.Array:
        """Maps features [batch, length, width] to features; `causal` hides what comes later."""
        length = x.shape[1]
        x = x + self.positions[...][None, :length]
        mask = nnx.make_causal_mask(jnp.ones((1, length))) if causal else None
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class ImageClassifier(nnx.Module):
    """Cuts an image into patches, runs a Transformer over them and averages its features."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch: int,
        *,
        classes: int = 10,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        batch_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layers.

        Args:
          image_shape: height, width, channels.
          patch: side of a patch; must divide height and width.
          classes: number of outputs.
          width: features of a patch; see `Transformer` for this and the rest.
          heads: attention heads.
          layers: number of blocks.
          dropout: share dropped in training.
          batch_norm: whether BatchNorm follows the patch embedding.
          rngs: streams "params" and "dropout".
        """
        rows, columns, channels = image_shape
        number = (rows // patch) * (columns // patch)
        self.embed = nnx.Conv(channels, width, (patch, patch), strides=patch, rngs=rngs)
        self.embed_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs) if batch_norm else None
        self.transformer = Transformer(number, width, heads, layers, dropout, rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images [batch, height, width, channels]."""
        patches = self.embed(x)
        if self.embed_norm is not None:
            patches = self.embed_norm(patches)
        features = self.transformer(patches.reshape(len(x), -1, patches.shape[-1]))
        return self.head(jnp.mean(features, 1))


class LanguageModel(nnx.Module):
    """Predicts each token from those before it."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ):
        """Makes the layers.

        Args:
          vocabulary: number of tokens.
          length: longest sequence.
          width: features of a token; see `Transformer` for this and the rest.
          heads: attention heads.
          layers: number of blocks.
          dropout: share dropped in training.
          rngs: streams "params" and "dropout".
        """
        init = nnx.initializers.normal(INIT_STD)
        self.embed = nnx.Embed(vocabulary, width, embedding_init=init, rngs=rngs)
        self.transformer = Transformer(length, width, heads, layers, dropout, rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns, for tokens [batch, length], the logits of the token after each."""
        return self.head(self.transformer(self.embed(tokens), causal=True))


class _Block(nnx.Module):
    """Attention and a two-layer network, each added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        # In training mode until `.eval()`, as `nnx.Dropout` is.
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, deterministic=False, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
        return x + self.dropout(self.contract(nnx.gelu(self.expand(self.norm(x)))))
