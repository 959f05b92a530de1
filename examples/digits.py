"""Scikit-learn's handwritten digits as arrays, and batches of them, for the small examples."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets


class Digits(NamedTuple):
    """1797 images of ten digits, split once at random.

    Attributes:
      train: images, float32 [number, 8, 8, 1] in [0, 1], and labels, int32 [number].
      test: the same of all others.
    """

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load(train_size: int = 1000, seed: int = 0) -> Digits:
    """Loads and splits the digits; nothing is downloaded."""
    data = sklearn.datasets.load_digits()
    images = (data.data.astype(np.float32) / 16).reshape(-1, 8, 8, 1)
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:train_size], order[train_size:]
    return Digits(
        train=(jnp.asarray(images[train]), jnp.asarray(labels[train])),
        test=(jnp.asarray(images[test]), jnp.asarray(labels[test])),
    )


def batches(
    data: tuple[jax.Array, jax.Array], steps: int, batch_size: int, seed: int = 0
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields `steps` random batches of images and labels."""
    images, labels = data
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        rows = rng.choice(len(images), batch_size, replace=False)
        yield images[rows], labels[rows]
