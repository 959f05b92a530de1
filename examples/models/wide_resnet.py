"""Wide residual networks with BatchNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flatopt.measures import Units

KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class WideResNet(nn.Module):
    """WRN-depth-width for small images: `WideResNet(16, 4)` is WRN-16-4, `(28, 10)` WRN-28-10.

    Three groups of pre-activation blocks, of 16, 32 and 64 times `width` channels; the last two
    halve the image. Zagoruyko, Komodakis, Wide Residual Networks, arXiv:1605.07146.

    Attributes:
      depth: number of layers, 6 n + 4 for n blocks a group.
      width: how much wider than a plain residual network.
      classes: number of outputs.
      dropout: share of channels' values dropped between the convolutions of a block in training.
      momentum: of the running statistics.
      dtype: what to compute in; parameters and statistics stay float32.
    """

    depth: int = 16
    width: int = 4
    classes: int = 10
    dropout: float = 0.0
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images [batch, height, width, channels].

        With `train`, BatchNorm uses and updates the batch's statistics (`mutable=["batch_stats"]`),
        and dropout needs `rngs={"dropout": key}`.
        """
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={self.depth} must be 6 n + 4 with n >= 1: 10, 16, 22, 28, ...")
        x = _conv(16, 1, 3, self.dtype)(x)
        for group in range(3):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                channels = 16 * 2**group * self.width
                x = _Block(channels, stride, self.dropout, self.momentum, self.dtype)(x, train)
        x = _normalise(train, self.momentum, self.dtype)(x)
        return nn.Dense(self.classes)(jnp.mean(nn.relu(x), (1, 2)).astype(jnp.float32))


class _Block(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut."""

    channels: int
    stride: int
    dropout: float
    momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(_normalise(train, self.momentum, self.dtype)(x))
        if self.stride > 1 or x.shape[-1] != self.channels:
            x = _conv(self.channels, self.stride, 1, self.dtype)(y)
        y = _conv(self.channels, self.stride, 3, self.dtype)(y)
        y = nn.relu(_normalise(train, self.momentum, self.dtype)(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + _conv(self.channels, 1, 3, self.dtype)(y)


def _conv(channels: int, stride: int, size: int, dtype: Any) -> nn.Conv:
    return nn.Conv(
        channels, (size, size), stride, use_bias=False, kernel_init=KERNEL_INIT, dtype=dtype
    )


def _normalise(train: bool, momentum: float, dtype: Any) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=momentum, dtype=dtype)


def residual_units(variables: Any) -> tuple[Units, ...]:
    """The hidden units of a `WideResNet`, for `measures.align_units` on all its variables.

    What is added must be permuted alike: the channels of one residual stream are one set of units,
    written by the last convolution of every block and read by the first layers of the next. A
    shortcut with a convolution ends a stream. The channels inside a block are a set of their own.
    """
    params = variables["params"]
    number = sum(name.startswith("_Block") for name in params)
    incoming, outgoing, found = [_out("Conv_0")], [], []
    for block in (f"_Block_{i}" for i in range(number)):
        convolutions = [f"{block}/Conv_{i}" for i in range(len(params[block]) - 2)]
        *shortcut, first, last = convolutions
        incoming += _norm(f"{block}/BatchNorm_0")
        outgoing += [_in(layer) for layer in [*shortcut, first]]
        if shortcut:
            found.append(Units(tuple(incoming), tuple(outgoing)))
            incoming, outgoing = [_out(*shortcut)], []
        incoming.append(_out(last))
        inside = (_out(first), *_norm(f"{block}/BatchNorm_1"))
        found.append(Units(inside, (_in(last),)))
    incoming += _norm("BatchNorm_0")
    return (*found, Units(tuple(incoming), (*outgoing, _in("Dense_0"))))


def _out(layer: str) -> tuple[str, int]:
    return f"params/{layer}/kernel", -1


def _in(layer: str) -> tuple[str, int]:
    return f"params/{layer}/kernel", -2


def _norm(layer: str) -> list[tuple[str, int]]:
    """BatchNorm's numbers, one a channel: scale and shift, and the running statistics."""
    parts = ("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var")
    return [(f"{collection}/{layer}/{name}", -1) for collection, name in parts]
