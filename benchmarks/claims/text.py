"""Tasks of text: sentences and messages to be classified, plays to be continued."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.claims.task import (
    Init,
    Task,
    accuracy,
    arrays,
    cross_entropy,
    drawer,
    minus_bits,
    of_module,
    read,
)

PADDING, UNKNOWN = 0, 1
SENTENCE = 52  # Words of the longest sentence of SST-2.
MESSAGE = 128  # Words that are read of a message.
SHAKESPEARE = "tinyshakespeare.txt"
TEST_SHARE = 0.1  # The plays' end.


class Bag(nn.Module):
    """The mean of the words' embeddings, a hidden layer, and logits.

    Attributes:
      vocabulary: number of words, with those for padding and for unknown ones.
      width: of an embedding and of the hidden layer.
      classes: number of outputs.
    """

    vocabulary: int
    width: int = 32
    classes: int = 2

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        """Logits of texts [texts, places]."""
        there = (words != PADDING)[..., None]
        h = jnp.sum(nn.Embed(self.vocabulary, self.width)(words) * there, 1)
        h = h / jnp.maximum(jnp.sum(there, 1), 1)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(self.width)(h)))


class Transformer(nn.Module):
    """Pre-LayerNorm blocks; one answer a text, or one a place from what stands before.

    Attributes:
      vocabulary: number of words or characters.
      classes: number of outputs.
      causal: an answer at each place, which sees itself and what stands before; otherwise one
        answer from the mean over the places that are not padding.
      width: features of a place.
      heads: attention heads.
      layers: number of blocks.
    """

    vocabulary: int
    classes: int
    causal: bool = False
    width: int = 32
    heads: int = 2
    layers: int = 2

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        """Logits of texts [texts, places]."""
        there = jnp.ones(words.shape, bool) if self.causal else words != PADDING
        length = words.shape[1]
        positions = self.param("positions", nn.initializers.normal(0.02), (1, length, self.width))
        h = nn.Embed(self.vocabulary, self.width)(words) + positions
        mask = nn.make_causal_mask(words) if self.causal else there[:, None, None, :]
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            h = h + attention(nn.LayerNorm()(h), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)))
            h = h + nn.Dense(self.width)(hidden)
        h = nn.LayerNorm()(h)
        if not self.causal:
            # A text without words, as there are, has a mean of zero.
            number = jnp.maximum(jnp.sum(there, 1, keepdims=True), 1)
            h = jnp.sum(h * there[..., None], 1) / number
        return nn.Dense(self.classes)(h)


class GRU(nn.Module):
    """A recurrent network that says, at each place, what comes next.

    Attributes:
      vocabulary: number of characters.
      width: features of a place and of the memory.
    """

    vocabulary: int
    width: int = 64

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Logits [texts, places, vocabulary]."""
        h = nn.Embed(self.vocabulary, self.width)(characters)
        return nn.Dense(self.vocabulary)(nn.RNN(nn.GRUCell(self.width))(h))


def sst2_bag(data_dir: Path | None, *, width: int = 32, **options: Any) -> Task:
    """Whether a sentence about a film is kind; the mean of its words."""
    return _classify("sst2_bag", data_dir, lambda v, c: Bag(v, width, c), **(SST2 | options))


def sst2_transformer(data_dir: Path | None, *, width: int = 32, **options: Any) -> Task:
    """The same by a Transformer of two blocks."""

    def model(vocabulary: int, classes: int) -> nn.Module:
        return Transformer(vocabulary, classes, width=width)

    return _classify("sst2_transformer", data_dir, model, **(SST2 | options))


def news20_bag(data_dir: Path | None, *, width: int = 32, **options: Any) -> Task:
    """Which of 20 groups a message was sent to; the mean of its first words."""
    return _classify("news20_bag", data_dir, lambda v, c: Bag(v, width, c), **(NEWS | options))


SST2: dict[str, Any] = {
    "source": "sst2",
    "length": SENTENCE,
    "examples": 4000,
    "valid_examples": 872,
}
NEWS: dict[str, Any] = {
    "source": "news20",
    "length": MESSAGE,
    "examples": 6000,
    "valid_examples": 1500,
}


def _classify(
    name: str,
    data_dir: Path | None,
    make: Callable[[int, int], nn.Module],
    *,
    source: str,
    length: int,
    examples: int,
    valid_examples: int,
    vocabulary: int = 8000,
    batch_size: int = 32,
    label_noise: float = 0.0,
) -> Task:
    """A task of texts with a class each.

    Args:
      name: of the task.
      data_dir: the folder of the data.
      make: the model of so many words and classes.
      source: of `SOURCE.npz`; where it has a validation part, validation examples are from there.
      length: words of a text that are read.
      examples, valid_examples, label_noise: see `drawer`.
      vocabulary: words that are told apart, the most frequent ones; the others are one.
      batch_size: texts of a step.
    """
    found = arrays(data_dir, f"{source}.npz")
    parts = [part for part in ("train", "valid", "test") if f"y_{part}" in found]
    words = [padded(found[f"ids_{p}"], found[f"ptr_{p}"], length, vocabulary) for p in parts]
    labels = np.concatenate([found[f"y_{part}"] for part in parts]).astype(np.int32)
    ends = np.cumsum([0, *(len(own) for own in words)])
    rows = {p: np.arange(*ends[i : i + 2]) for i, p in enumerate(parts)}
    inputs = np.concatenate(words)
    # One more for padding; the words of the file begin with the unknown one.
    model = make(min(vocabulary, len(found["vocab"])) + 1, int(labels.max()) + 1)
    init, apply = _of_tokens(model, inputs)
    draw = drawer(
        inputs, labels, rows["test"], examples=examples, valid_examples=valid_examples,
        valid_rows=rows.get("valid"), label_noise=label_noise,
    )  # fmt: skip
    return Task(name, init, apply, draw, cross_entropy, accuracy, batch_size)


def padded(ids: np.ndarray, ends: np.ndarray, length: int, vocabulary: int) -> np.ndarray:
    """Texts of one length, uint16 [texts, length]: words by rank, from `UNKNOWN`, and padding."""
    texts = np.full((len(ends) - 1, length), PADDING, np.uint16)
    known = np.where(ids < vocabulary, ids.astype(np.int64) + UNKNOWN, UNKNOWN)
    for row, (begin, end) in enumerate(itertools.pairwise(ends)):
        own = known[begin : min(end, begin + length)]
        texts[row, : len(own)] = own
    return texts


def shakespeare_gru(data_dir: Path | None, *, width: int = 64, **options: Any) -> Task:
    """The next character of a play, by a recurrent network."""
    return _continue("shakespeare_gru", data_dir, lambda n: GRU(n, width), **options)


def shakespeare_transformer(data_dir: Path | None, *, width: int = 64, **options: Any) -> Task:
    """The next character of a play, by a Transformer of two blocks."""

    def model(characters: int) -> nn.Module:
        return Transformer(characters, characters, causal=True, width=width)

    return _continue("shakespeare_transformer", data_dir, model, **options)


def _continue(
    name: str,
    data_dir: Path | None,
    make: Callable[[int], nn.Module],
    *,
    examples: int = 2000,
    valid_examples: int = 300,
    test_examples: int = 1000,
    length: int = 64,
    batch_size: int = 16,
) -> Task:
    """A task of pieces of a text; its metric is minus the bits of a character.

    Args:
      name: of the task.
      data_dir: the folder of the text.
      make: the model of so many characters.
      examples, valid_examples: pieces; see `drawer`.
      test_examples: pieces of the text's last tenth, the first so many.
      length: characters of a piece.
      batch_size: pieces of a step.
    """
    text = read(data_dir, SHAKESPEARE).read_text()
    characters = sorted(set(text))
    code = {character: number for number, character in enumerate(characters)}
    codes = np.array([code[character] for character in text], np.uint8)
    number = len(codes) // (length + 1)
    pieces = codes[: number * (length + 1)].reshape(number, length + 1)
    test = np.arange(round((1 - TEST_SHARE) * number), number)[:test_examples]
    # What is left of the end is no one's: the pieces beside those of the test are not trained on.
    trained = np.concatenate([pieces[: round((1 - TEST_SHARE) * number)], pieces[test]])
    inputs, targets = trained[:, :-1], trained[:, 1:].astype(np.int32)
    init, apply = _of_tokens(make(len(characters)), inputs)
    test = np.arange(len(trained) - len(test), len(trained))
    draw = drawer(inputs, targets, test, examples=examples, valid_examples=valid_examples)
    return Task(name, init, apply, draw, cross_entropy, minus_bits, batch_size)


def _of_tokens(model: nn.Module, inputs: np.ndarray) -> tuple[Init, Any]:
    return of_module(model, inputs[:1], lambda x: jnp.asarray(x, jnp.int32))
