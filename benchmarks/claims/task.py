"""What a task is: a network, its data, and how each seed's examples are drawn.

The test part is the same for all seeds, and neither training nor tuning sees it: training and
validation examples are drawn from the other part alone. A draw depends on nothing but the seed and
the task's options, so that arms are compared seed by seed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.compare.datasets import DataError

Apply = Callable[[Any, Any, Any, bool], tuple[jax.Array, Any]]
Init = Callable[[jax.Array], tuple[Any, Any]]


class Split(NamedTuple):
    """Examples and what they should be called.

    Attributes:
      inputs: tree of numpy arrays with a leading axis of examples, small integers where they are.
      targets: int32, the same leading axis.
    """

    inputs: Any
    targets: np.ndarray


class Parts(NamedTuple):
    """The examples of one seed; the shapes are those of every seed.

    Attributes:
      train: to train on; the only part with label noise.
      valid: to tune and to stop on.
      test: looked at once.
    """

    train: Split
    valid: Split
    test: Split


class Task(NamedTuple):
    """A network and its data.

    Attributes:
      name: of the task.
      init: `init(key)`, parameters and BatchNorm's running statistics ({} without).
      apply: `apply(params, stats, inputs, train)`, logits and new statistics.
      draw: `draw(seed)`, the seed's examples.
      loss: `loss(logits, targets)`, mean cross-entropy.
      metric: `metric(logits, targets)`, the mean over examples of what should be large: accuracy,
        or minus bits a character.
      batch_size: examples of a step.
    """

    name: str
    init: Init
    apply: Apply
    draw: Callable[[int], Parts]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    metric: Callable[[jax.Array, jax.Array], jax.Array]
    batch_size: int


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def accuracy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of examples called rightly."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == targets)


def minus_bits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Minus the bits that a target costs."""
    return -cross_entropy(logits, targets) / jnp.log(2.0)


def of_module(
    model: nn.Module, example: Any, prepare: Callable[[Any], jax.Array]
) -> tuple[Init, Apply]:
    """`init` and `apply` of a Flax module; with BatchNorm it takes an argument `train`.

    Args:
      model: takes the prepared inputs.
      example: inputs of one example or more, for their shapes.
      prepare: from inputs as they are kept to those of the model.
    """

    def init(key: jax.Array) -> tuple[Any, Any]:
        variables = model.init(key, prepare(example))
        return variables["params"], variables.get("batch_stats", {})

    def apply(params: Any, stats: Any, inputs: Any, train: bool) -> tuple[jax.Array, Any]:
        x = prepare(inputs)
        if not stats:
            return cast(jax.Array, model.apply({"params": params}, x)), stats
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return cast(jax.Array, model.apply(variables, x)), stats
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return init, apply


def drawer(
    inputs: Any,
    targets: np.ndarray,
    test_rows: np.ndarray,
    *,
    examples: int,
    valid_examples: int,
    valid_rows: np.ndarray | None = None,
    label_noise: float = 0.0,
    balanced: bool = False,
) -> Callable[[int], Parts]:
    """How a seed draws its examples.

    Args:
      inputs, targets: all examples.
      test_rows: the test part; it is never drawn from.
      examples: how many a seed trains on.
      valid_examples: how many it validates on, drawn from what is left.
      valid_rows: draw them from here instead, and none of these is trained on.
      label_noise: the share of training labels that become another class, each other one alike.
      balanced: as many training examples of each class.
    """
    rest = np.setdiff1d(np.arange(len(targets)), test_rows)
    own = rest if valid_rows is None else np.setdiff1d(rest, valid_rows)
    most = len(own) - (valid_examples if valid_rows is None else 0)
    if not 0 < examples <= most:
        raise ValueError(f"examples={examples} must be in 1 .. {most}: {most} may be trained on")
    if not 0.0 <= label_noise < 1.0:
        raise ValueError(f"label_noise={label_noise} must be in [0, 1), a share of labels")
    classes = int(targets.max()) + 1

    def draw(seed: int) -> Parts:
        rng = np.random.default_rng([seed, 0])
        order = rng.permutation(own)
        if balanced:
            order = _first_of_each_class(order, targets[order], examples // classes)
        train = order[:examples]
        spare = order[examples:] if valid_rows is None else rng.permutation(valid_rows)
        labels = with_label_noise(rng, targets[train], classes, label_noise)
        valid = spare[:valid_examples]
        return Parts(
            Split(_rows(inputs, train), labels),
            Split(_rows(inputs, valid), targets[valid]),
            Split(_rows(inputs, test_rows), targets[test_rows]),
        )

    return draw


def with_label_noise(
    rng: np.random.Generator, labels: np.ndarray, classes: int, share: float
) -> np.ndarray:
    """Labels of which exactly that share, rounded, is wrong."""
    if not share:  # Labels may be one a place of a text, and are then never noisy.
        return labels
    noisy = rng.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    # A shift by 1 to classes - 1: a noisy label is never the right one by accident.
    shift = rng.integers(1, classes, len(noisy), dtype=np.int32)
    labels[noisy] = (labels[noisy] + shift) % classes
    return labels


def _first_of_each_class(order: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """The order with the first `number` of each class moved to the front."""
    first = [np.flatnonzero(labels == label)[:number] for label in range(int(labels.max()) + 1)]
    front = np.concatenate(first)
    return np.concatenate([order[front], np.delete(order, front)])


def _rows(inputs: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[rows], inputs)


def read(data_dir: Path | None, file: str) -> Path:
    """The path of a data file.

    Raises:
      DataError: if it is not there.
    """
    if data_dir is None:
        raise DataError(f"{file} is not part of a package: name its folder with --data-dir")
    path = Path(data_dir) / file
    if not path.is_file():
        raise DataError(f"{path} does not exist: --data-dir names the folder of {file}")
    return path


def arrays(data_dir: Path | None, file: str) -> dict[str, np.ndarray]:
    """Every array of an `.npz` file."""
    with np.load(read(data_dir, file), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
