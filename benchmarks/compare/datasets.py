"""Image data sets, and the same splits and batches for every method.

Each seed has its own split and its own order of batches. They depend on nothing but the seed, so
that two methods can be compared seed by seed.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import sklearn.datasets

Array = np.ndarray | jax.Array

# Name here -> name on openml.org and number of training images, which come first there.
OPENML = {
    "mnist": ("mnist_784", 60_000),
    "fashion_mnist": ("Fashion-MNIST", 60_000),
    "cifar10": ("CIFAR_10", 50_000),
}
FIELDS = ("x_train", "y_train", "x_test", "y_test")


class DataError(ValueError):
    """A data set that cannot be had; the message is one line for the user."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels, training images first.

    Attributes:
      images: uint8 [number, features].
      labels: int32 [number].
      shift: inputs are `(pixel - shift) / scale`. Digits are scaled to [0, 1]; larger images are
        standardised by one mean and one standard deviation over all training images, without which
        a plain network hardly trains on them.
      scale: see `shift`.
      num_train: images that may be trained on; the others are the test set. None: there is no
        fixed test set, and what a seed does not train on is its test set.
    """

    images: np.ndarray
    labels: np.ndarray
    shift: float
    scale: float
    num_train: int | None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    @property
    def largest_train_size(self) -> int:
        """The most images that one seed can train on."""
        return len(self.images) - 1 if self.num_train is None else self.num_train


class Split(NamedTuple):
    """Which images each seed trains and tests on; the leading axis is the seed.

    Attributes:
      train_rows: int32 [seeds, train_size], rows of `Dataset.images`.
      train_labels: int32 [seeds, train_size], with label noise, if any.
      test_rows: int32 [seeds, test_size].
    """

    train_rows: Array
    train_labels: Array
    test_rows: Array


class Batches(NamedTuple):
    """The batches of a run; the axes are step, seed, position in the batch.

    Attributes:
      rows: int32, rows of `Dataset.images`.
      labels: int32, the labels to train on.
    """

    rows: Array
    labels: Array


def load(name: str, data_dir: Path | None) -> Dataset:
    """Loads a data set by name.

    Args:
      name: "digits" (part of scikit-learn), the name of an `.npz` file in `data_dir`, or, without a
        `data_dir`, a name in `OPENML`, which is downloaded.
      data_dir: folder of `.npz` files with the arrays `FIELDS`; images are uint8
        [number, height, width] or [number, height, width, channels].

    Raises:
      DataError: if there is no such data set, or it cannot be read or downloaded.
    """
    if name == "digits":
        digits = sklearn.datasets.load_digits()
        return Dataset(digits.data.astype(np.uint8), digits.target.astype(np.int32), 0, 16, None)
    if data_dir is not None:
        return _load_npz(name, data_dir)
    if name in OPENML:
        return _download(name)
    known = ", ".join(["digits", *OPENML])
    raise DataError(f"unknown data set {name!r}: without a data folder there are {known}")


def _load_npz(name: str, data_dir: Path) -> Dataset:
    if not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} does not exist")
    path = data_dir / f"{name}.npz"
    # A name, not a path: nothing outside the folder is read.
    if Path(name).name != name or not path.is_file():
        known = ", ".join(["digits", *sorted(p.stem for p in data_dir.glob("*.npz"))])
        raise DataError(f"unknown data set {name!r}: {data_dir} offers {known}")
    try:
        # Opened here, so that it is closed here even when numpy cannot make sense of it.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: list[np.ndarray] = [file[field] for field in FIELDS]
    except KeyError:
        wanted = ", ".join(FIELDS)
        raise DataError(f"{path} is not an image data set: it needs the arrays {wanted}") from None
    except Exception as error:  # A broken archive raises errors of many kinds.
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from None
    x_train, y_train, x_test, y_test = arrays
    images_fit = all(x.dtype == np.uint8 and x.ndim in (3, 4) and len(x) for x in (x_train, x_test))
    if not images_fit or x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{path} needs uint8 images of one size, [number, height, width(, channels)]"
        )
    if y_train.shape != x_train.shape[:1] or y_test.shape != x_test.shape[:1]:
        raise DataError(f"{path} needs one label an image")
    images = np.concatenate([x_train, x_test]).reshape(len(x_train) + len(x_test), -1)
    labels = np.concatenate([y_train, y_test]).astype(np.int32)
    return _standardised(images, labels, len(x_train))


def _download(name: str) -> Dataset:
    openml_name, num_train = OPENML[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What goes wrong is said below, once.
            bunch = sklearn.datasets.fetch_openml(openml_name, version=1, as_frame=False)
    except Exception as error:  # No network, no such host, a broken cache, a changed site.
        raise DataError(
            f"{openml_name} could not be downloaded from openml.org ({_one_line(error)}); "
            "name a folder of .npz files with --data-dir, or use --dataset digits"
        ) from None
    return _standardised(bunch.data.astype(np.uint8), bunch.target.astype(np.int32), num_train)


def _standardised(images: np.ndarray, labels: np.ndarray, num_train: int) -> Dataset:
    train = images[:num_train]
    # Images of one grey have no spread: then only the shift remains.
    return Dataset(images, labels, float(train.mean()), float(train.std()) or 1.0, num_train)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def split(
    dataset: Dataset, seeds: Sequence[int], train_size: int, label_noise: float = 0.0
) -> Split:
    """Draws each seed's training images; `label_noise` is the share that gets a wrong label."""
    parts = [_split_one(dataset, seed, train_size, label_noise) for seed in seeds]
    return Split(*(np.stack(part) for part in zip(*parts, strict=True)))


def _split_one(dataset: Dataset, seed: int, train_size: int, label_noise: float) -> Split:
    rng = np.random.default_rng([seed, 0])
    total = len(dataset.images)
    order = rng.permutation(total if dataset.num_train is None else dataset.num_train)
    train_rows = order[:train_size].astype(np.int32)
    if dataset.num_train is None:
        test_rows = order[train_size:].astype(np.int32)
    else:
        test_rows = np.arange(dataset.num_train, total, dtype=np.int32)
    labels = dataset.labels[train_rows]
    noisy = rng.permutation(train_size)[: round(label_noise * train_size)]
    # A shift by 1 to classes - 1: a noisy label is never the right one by accident.
    shift = rng.integers(1, dataset.classes, len(noisy), dtype=np.int32)
    labels[noisy] = (labels[noisy] + shift) % dataset.classes
    return Split(train_rows, labels, test_rows)


def batches(split: Split, seeds: Sequence[int], steps: int, batch_size: int) -> Batches:
    """Each seed's batches: one random order of its images after another, cut into batches.

    A shorter run sees the first batches of a longer one.
    """
    size = split.train_rows.shape[1]
    epochs = -(-steps * batch_size // size)

    def positions(seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, 1])
        stream = np.concatenate([rng.permutation(size) for _ in range(epochs)])
        return stream[: steps * batch_size].reshape(steps, batch_size)

    order = [positions(seed) for seed in seeds]

    def gather(values: Array) -> np.ndarray:
        return np.stack([own[where] for own, where in zip(values, order, strict=True)], axis=1)

    return Batches(gather(split.train_rows), gather(split.train_labels))
