"""Tasks of images: handwritten digits, clothes, small photographs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims.task import Task, accuracy, cross_entropy, drawer, of_module
from benchmarks.compare import datasets
from examples.models.batch_norm_mlp import BatchNormMLP
from examples.models.mlp import MLP

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


DIGITS = {"source": "digits", "examples": 300, "valid_examples": 300, "batch_size": 32}
FASHION = {"source": "fashion_mnist", "examples": 5000, "valid_examples": 2000, "batch_size": 64}


def _flat(name: str, data_dir: Path | None, model: Any, options: dict[str, Any]) -> Task:
    """A network on pixels without places."""
    return _image_task(name, data_dir, model, lambda x: x, **options)


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
