"""Tasks of images: handwritten digits, clothes, small photographs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.claims.task import Apply, Task, accuracy, cross_entropy, drawer, of_module
from benchmarks.compare import datasets
from examples.models.batch_norm_mlp import BatchNormMLP
from examples.models.cnn import CNN
from examples.models.mlp import MLP
from examples.models.wide_resnet import WideResNet

DIGITS_TEST = 797  # Of 1797; they have no test part of their own.


def digits_mlp(data_dir: Path | None = None, *, width: int = 64, **options: Any) -> Task:
    """8x8 digits and a small network; 300 of them, so that it can overfit."""
    del data_dir  # They are part of scikit-learn.
    return _flat("digits_mlp", None, MLP((width, width)), DIGITS | options)


def digits_mlp_bn(data_dir: Path | None = None, *, width: int = 64, **options: Any) -> Task:
    """The same with BatchNorm."""
    del data_dir
    return _flat("digits_mlp_bn", None, BatchNormMLP((width, width)), DIGITS | options)


def fashion_mlp(data_dir: Path | None, *, width: int = 128, **options: Any) -> Task:
    """28x28 clothes and a network of two hidden layers."""
    return _flat("fashion_mlp", data_dir, MLP((width, width)), FASHION | options)


def fashion_cnn(data_dir: Path | None, *, width: int = 16, **options: Any) -> Task:
    """28x28 clothes and two convolutions with BatchNorm, of `width` channels and twice as many."""
    model = CNN((width, 2 * width), dropout=0.0)
    arrange = functools.partial(_as_images, side=28, shrink=1)
    return _convolutional("fashion_cnn", data_dir, model, arrange, FASHION | options)


def cifar_resnet(
    data_dir: Path | None, *, width: int = 1, depth: int = 10, side: int = 16, **options: Any
) -> Task:
    """Small photographs and a residual network with BatchNorm.

    Args:
      data_dir: the folder of `cifar10_25k.npz`.
      width, depth: of the `WideResNet`: 4 and 16 is WRN-16-4.
      side: 32 as they are, 16 as means of four pixels, at a quarter of the cost.
      **options: see `_image_task`.
    """
    if side not in (16, 32):
        raise ValueError(f"side={side} must be 16 or 32")
    model = WideResNet(depth, width)
    arrange = functools.partial(_as_images, side=32, shrink=32 // side)
    return _convolutional("cifar_resnet", data_dir, model, arrange, CIFAR | options)


DIGITS: dict[str, Any] = {
    "source": "digits",
    "examples": 300,
    "valid_examples": 300,
    "batch_size": 32,
}
FASHION: dict[str, Any] = {
    "source": "fashion_mnist",
    "examples": 5000,
    "valid_examples": 2000,
    "batch_size": 64,
}
CIFAR: dict[str, Any] = {
    "source": "cifar10_25k",
    "examples": 5000,
    "valid_examples": 2000,
    "batch_size": 64,
}
# Convolutions over all 10000 would cost as much as the training.
FEW: dict[str, Any] = {"test_examples": 2000}


def _flat(name: str, data_dir: Path | None, model: Any, options: dict[str, Any]) -> Task:
    """A network on pixels without places."""
    return _image_task(name, data_dir, model, lambda x: x, **options)


def _as_images(pixels: jax.Array, side: int, shrink: int) -> jax.Array:
    """Flat pixels as images [images, side / shrink, side / shrink, channels], by means."""
    small = side // shrink
    x = pixels.reshape(len(pixels), small, shrink, small, shrink, -1)
    return jnp.mean(x, (2, 4))


def _convolutional(
    name: str,
    data_dir: Path | None,
    model: nn.Module,
    arrange: Callable[[jax.Array], jax.Array],
    options: dict[str, Any],
) -> Task:
    """A network with convolutions, which on a CPU become products of matrices."""
    task = _image_task(name, data_dir, model, arrange, **(FEW | options))
    return task if jax.default_backend() != "cpu" else task._replace(apply=by_products(task.apply))


def by_products(apply: Apply) -> Apply:
    """The same function with every convolution as one product of matrices.

    Under `jax.vmap` over seeds each has its own kernel, which XLA makes a convolution in groups:
    on a CPU that is tens of times slower than a product in a batch.
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, nn.Conv) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        y = convolve(args[0], layer.get_variable("params", "kernel"), _stride(layer))
        return y + layer.get_variable("params", "bias") if layer.use_bias else y

    def applied(params: Any, stats: Any, inputs: Any, train: bool) -> tuple[jax.Array, Any]:
        with nn.intercept_methods(interceptor):
            return apply(params, stats, inputs, train)

    return applied


def _stride(layer: nn.Conv) -> int:
    """The stride, which these networks have alike both ways."""
    stride = layer.strides or 1
    return stride if isinstance(stride, int) else stride[0]


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution [images, height, width, channels] padded to "SAME", as a product."""
    height, width, channels, outputs = kernel.shape
    shape = [-(-size // stride) for size in x.shape[1:3]]
    total = [
        max((n - 1) * stride + k - size, 0)
        for n, k, size in zip(shape, (height, width), x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in shape)
    shifted = [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(height * width * channels, outputs)


def _image_task(
    name: str,
    data_dir: Path | None,
    model: Any,
    arrange: Callable[[jax.Array], jax.Array],
    *,
    source: str,
    examples: int,
    valid_examples: int,
    batch_size: int,
    label_noise: float = 0.0,
    test_examples: int | None = None,
) -> Task:
    """A task of images.

    Args:
      name: of the task.
      data_dir: the folder of `source`.
      model: takes arranged pixels.
      arrange: from flat pixels to what the model takes.
      source: the data set's name.
      examples, valid_examples, label_noise: see `drawer`.
      batch_size: images of a step.
      test_examples: the first so many of the test part; None: all.
    """
    data = load(source, data_dir)
    test = _test_rows(data)[:test_examples]

    def prepare(images: Any) -> jax.Array:
        return arrange((jnp.asarray(images, jnp.float32) - data.shift) / data.scale)

    init, apply = of_module(model, np.zeros((1, data.images.shape[1]), np.uint8), prepare)
    draw = drawer(
        data.images, data.labels, test,
        examples=examples, valid_examples=valid_examples, label_noise=label_noise,
    )  # fmt: skip
    return Task(name, init, apply, draw, cross_entropy, accuracy, batch_size)


@functools.lru_cache(maxsize=2)
def load(source: str, data_dir: Path | None) -> datasets.Dataset:
    """The data set, read once: unpacking some takes seconds."""
    return datasets.load(source, data_dir)


def _test_rows(data: datasets.Dataset) -> np.ndarray:
    if data.num_train is not None:
        return np.arange(data.num_train, len(data.images))
    return np.sort(np.random.default_rng(0).permutation(len(data.images))[:DIGITS_TEST])
