"""Contractions and convolutions with a tap: what goes into them, as rows of their kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import taps


def tap_dot_general(name: str, dot_general: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`dot_general` of inputs and the kernel of the layer `name`, with a tap."""

    def tapped(
        lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        outputs = dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        (axes, _), (batch_axes, _) = dimension_numbers
        if len(batch_axes):  # A kernel for each of them: not one layer.
            return outputs
        inputs = jnp.moveaxis(lhs, axes, range(-len(axes), 0))
        return taps.tap(name, inputs, outputs)

    return tapped


def tap_convolution(name: str, convolution: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jax.lax.conv_general_dilated` of inputs and the kernel of the layer `name`, with a tap."""

    def tapped(
        lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **kwargs: Any
    ) -> jax.Array:
        outputs = convolution(lhs, rhs, window_strides, padding, **kwargs)
        if kwargs.get("feature_group_count", 1) != 1:  # Groups of channels have their own kernels.
            return outputs
        names = "lhs_dilation", "rhs_dilation", "dimension_numbers"
        how = {name: kwargs[name] for name in names if name in kwargs}
        return taps.tap(name, patches(lhs, rhs.shape, window_strides, padding, **how), outputs)

    return tapped


def patches(
    inputs: jax.Array, kernel_shape: tuple[int, ...], strides: Any, padding: Any, **how: Any
) -> jax.Array:
    """What each position of a convolution sees, `[batch, ..., rows of the kernel]`.

    Channels are last, in inputs and outputs; a kernel is `[..., channels, outputs]`.
    """
    window = kernel_shape[:-2]
    found = jax.lax.conv_general_dilated_patches(inputs, window, strides, padding, **how)
    # Entries of the window vary fastest there, and channels in the kernel.
    found = found.reshape(*found.shape[:-1], kernel_shape[-2], -1)
    return jnp.swapaxes(found, -1, -2).reshape(*found.shape[:-2], -1)
