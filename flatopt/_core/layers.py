"""Which leaves are one layer: a kernel and its bias, together one matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import tree_math

KERNELS, BIASES = ("kernel", "w"), ("bias", "b")


class Layer(NamedTuple):
    """One layer of a tree.

    Attributes:
      kernel: number of its leaf among the leaves of the tree.
      bias: likewise, or None.
      inputs: number of rows of the kernel as a matrix, without the bias.
      outputs: number of its columns.
    """

    kernel: int
    bias: int | None
    inputs: int
    outputs: int

    @property
    def rows(self) -> int:
        """Rows of the joined matrix: the bias is the last."""
        return self.inputs + (self.bias is not None)

    @property
    def leaves(self) -> list[int]:
        """Numbers of its leaves."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]


def find_layers(tree: Any, choose: Callable[[str], bool] | None = None) -> dict[str, Layer]:
    """Layers by path, keys joined by "/": siblings "kernel" and "bias", or "w" and "b".

    A kernel's last axis is its output, or as many as its bias has: so for attention's projections.
    """
    places: dict[str, dict[str, tuple[int, Any]]] = {}
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if path:
            last = jax.tree_util.keystr(path[-1:], simple=True)
            parent = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            places.setdefault(parent, {})[last] = (i, leaf)
    found = {name: _layer(siblings) for name, siblings in places.items()}
    return {k: v for k, v in found.items() if v is not None and (choose is None or choose(k))}


def _layer(siblings: dict[str, tuple[int, Any]]) -> Layer | None:
    for kernel_name, bias_name in zip(KERNELS, BIASES, strict=True):
        number, kernel = siblings.get(kernel_name, (0, None))
        if kernel is None or np.ndim(kernel) < 2 or not _is_real(kernel) or not np.size(kernel):
            continue
        bias: Any
        bias_number, bias = siblings.get(bias_name, (None, None))
        shape, outs = np.shape(kernel), np.ndim(bias) if bias is not None else 0
        if not 0 < outs < len(shape) or np.shape(bias) != shape[-outs:] or not _is_real(bias):
            bias_number, outs = None, 1
        outputs = int(np.prod(shape[-outs:]))
        return Layer(number, bias_number, int(np.prod(shape[:-outs])), outputs)
    return None


def _is_real(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def join(layer: Layer, leaves: list[jax.Array]) -> jax.Array:
    """The layer's part of a tree as one matrix, in float32 at least; the bias is the last row."""
    kernel = tree_math.replicate(jnp.asarray(leaves[layer.kernel]))
    kernel = kernel.reshape(layer.inputs, layer.outputs)
    matrix = kernel.astype(tree_math.accumulator_dtype(kernel.dtype))
    if layer.bias is None:
        return matrix
    bias = tree_math.replicate(jnp.asarray(leaves[layer.bias])).reshape(1, layer.outputs)
    return jnp.concatenate([matrix, bias.astype(matrix.dtype)])


def put_back(layer: Layer, matrix: jax.Array, leaves: list[jax.Array]) -> None:
    """Puts the matrix into the list of leaves, in their shapes, dtypes and places."""
    parts = [matrix[: layer.inputs], matrix[layer.inputs :]]
    for number, part in zip(layer.leaves, parts, strict=False):
        like = jnp.asarray(leaves[number])
        leaf = part.reshape(like.shape).astype(like.dtype)
        if jax.typeof(like).sharding.mesh.are_all_axes_explicit:
            leaf = jax.sharding.reshard(leaf, jax.typeof(like).sharding)
        leaves[number] = leaf
