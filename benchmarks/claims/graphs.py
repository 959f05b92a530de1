"""Tasks of graphs: papers that cite each other; molecules and proteins."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.claims.task import Task, accuracy, arrays, cross_entropy, drawer, of_module

WORD = 32  # Links are kept as bits of such words.
TEST_FOLDS = 3  # Of ten: the sets are small.


def cora_gcn(
    data_dir: Path | None,
    *,
    width: int = 16,
    examples: int = 140,
    valid_examples: int = 500,
    label_noise: float = 0.0,
    batch_size: int | None = None,
) -> Task:
    """The subject of a paper, from its words and those of the papers around it, by two layers.

    The graph is whole in training, as usual there: inputs are numbers of nodes. A seed draws as
    many training papers of each class and its validation papers; the test papers are the public
    ones.

    Kipf, Welling, Semi-Supervised Classification with Graph Convolutional Networks,
    arXiv:1609.02907.

    Args:
      data_dir: the folder of `cora.npz`.
      width: hidden units.
      examples, valid_examples, label_noise: see `drawer`.
      batch_size: papers of a step; None: all that a seed trains on.
    """
    found = arrays(data_dir, "cora.npz")
    labels = found["y"].astype(np.int32)
    number, classes = len(labels), int(labels.max()) + 1
    links = np.eye(number, dtype=bool)
    links[tuple(found["edge_index"])] = True
    root = 1 / np.sqrt(links.sum(1, dtype=np.float32))
    words = found["x"].astype(np.float32)
    words /= np.maximum(words.sum(1, keepdims=True), 1)
    # What the first layer sees of a paper: it does not change, so it is computed once.
    seen = root[:, None] * (links.astype(np.float32) @ (root[:, None] * words))
    packed = pack(links)

    def init(key: jax.Array) -> tuple[Any, Any]:
        glorot = nn.initializers.glorot_uniform()
        first, second = jax.random.split(key)
        shapes = (words.shape[1], width), (width, classes)
        layers = [glorot(k, shape) for k, shape in zip((first, second), shapes, strict=True)]
        return {"first": layers[0], "second": layers[1]}, {}

    def apply(params: Any, stats: Any, inputs: Any, train: bool) -> tuple[jax.Array, Any]:
        del train
        hidden = jax.nn.relu(jnp.asarray(seen) @ params["first"])
        around = unpack(jnp.asarray(packed)[inputs], number) * root[None, :]
        mean = jnp.asarray(root)[inputs, None] * (around @ hidden)
        return mean @ params["second"], stats

    draw = drawer(
        np.arange(number, dtype=np.int32), labels, found["test_idx"], examples=examples,
        valid_examples=valid_examples, label_noise=label_noise, balanced=True,
    )  # fmt: skip
    size = batch_size or examples
    return Task("cora_gcn", init, apply, draw, cross_entropy, accuracy, size)


class GIN(nn.Module):
    """Layers that add up neighbours and pass the sum through a small network; graph by graph.

    Xu, Hu, Leskovec, Jegelka, How Powerful are Graph Neural Networks?, arXiv:1810.00826. Batch
    normalisation leaves out places without a node.

    Attributes:
      labels: number of node labels.
      width: features of a node.
      layers: how often neighbours are added up.
      classes: number of outputs.
    """

    labels: int
    width: int = 32
    layers: int = 3
    classes: int = 2

    @nn.compact
    def __call__(self, graphs: tuple[jax.Array, jax.Array], train: bool = False) -> jax.Array:
        """Logits of graphs.

        Args:
          graphs: labels of nodes [graphs, places], 0 where there is none, and links
            [graphs, places, places].
          train: whether BatchNorm uses and updates the batch's statistics.
        """
        labels, links = graphs
        there = (labels > 0)[..., None]
        h = nn.Embed(self.labels + 1, self.width)(labels.astype(jnp.int32)) * there
        logits = jnp.zeros((1, self.classes))
        for _ in range(self.layers):
            h = h + links @ h
            for _ in range(2):
                h = nn.Dense(self.width, use_bias=False)(h)
                h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(h, mask=there)
                h = nn.relu(h) * there
            # A sum, of the size of a mean: how much there is of something matters.
            logits = logits + nn.Dense(self.classes)(jnp.sum(h, 1) / labels.shape[1])
        return logits


def mutag_gin(data_dir: Path | None, **options: Any) -> Task:
    """Whether a molecule changes genes: 188 graphs."""
    defaults: dict[str, Any] = {"examples": 100, "valid_examples": 34, "nodes": None}
    return _graph_task("mutag", data_dir, **(defaults | options))


def proteins_gin(data_dir: Path | None, **options: Any) -> Task:
    """Whether a protein is an enzyme: 1113 graphs, of which one in fifteen is too large."""
    defaults: dict[str, Any] = {"examples": 500, "valid_examples": 200, "nodes": 96}
    return _graph_task("proteins", data_dir, **(defaults | options))


def nci1_gin(data_dir: Path | None, **options: Any) -> Task:
    """Whether a molecule slows a cancer: 4110 graphs, of which one in thirty is too large."""
    defaults: dict[str, Any] = {"examples": 2000, "valid_examples": 600, "nodes": 64}
    return _graph_task("nci1", data_dir, **(defaults | options))


def _graph_task(
    source: str,
    data_dir: Path | None,
    *,
    examples: int,
    valid_examples: int,
    nodes: int | None,
    width: int = 32,
    batch_size: int = 32,
    label_noise: float = 0.0,
) -> Task:
    """A task of whole graphs, padded to one size.

    Args:
      source: of `tu_SOURCE.npz`.
      data_dir: its folder.
      examples, valid_examples, label_noise: see `drawer`.
      nodes: graphs with more are left out of every part; None: none is.
      width: features of a node.
      batch_size: graphs of a step.
    """
    found = arrays(data_dir, f"tu_{source}.npz")
    graphs, kept = padded(found, nodes)
    labels = found["y"].astype(np.int32)[kept]
    fold = found["fold"][kept]
    places = graphs["nodes"].shape[1]
    model = GIN(int(found["node_label"].max()) + 1, width, classes=int(labels.max()) + 1)

    def prepare(inputs: Any) -> Any:
        return jnp.asarray(inputs["nodes"]), unpack(jnp.asarray(inputs["links"]), places)

    init, apply = of_module(model, {name: a[:1] for name, a in graphs.items()}, prepare)
    draw = drawer(
        graphs, labels, np.flatnonzero((fold >= 0) & (fold < TEST_FOLDS)),
        examples=examples, valid_examples=valid_examples, label_noise=label_noise,
    )  # fmt: skip
    return Task(f"{source}_gin", init, apply, draw, cross_entropy, accuracy, batch_size)


def padded(found: dict[str, np.ndarray], nodes: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """Graphs of one size, and which they are.

    Args:
      found: the arrays of a file.
      nodes: the most that a graph may have.

    Returns:
      "nodes", each node's label and one, uint8 [graphs, places], and "links", bits
      [graphs, places, words]; and the numbers of the graphs that are small enough.
    """
    ends, edge_ends = found["node_ptr"], found["edge_ptr"]
    sizes = np.diff(ends)
    kept = np.flatnonzero(sizes <= (nodes or sizes.max()))
    places = int(sizes[kept].max())
    labels = np.zeros((len(kept), places), np.uint8)
    links = np.zeros((len(kept), places, -(-places // WORD)), np.uint32)
    for own, graph in enumerate(kept):
        labels[own, : sizes[graph]] = found["node_label"][ends[graph] : ends[graph + 1]] + 1
        edges = found["edge_index"][:, edge_ends[graph] : edge_ends[graph + 1]] - ends[graph]
        matrix = np.zeros((places, places), bool)
        matrix[tuple(edges)] = True
        links[own] = pack(matrix)
    return {"nodes": labels, "links": links}, kept


def pack(bits: np.ndarray) -> np.ndarray:
    """The last axis as bits of words, the lowest first; zeros fill the last word."""
    number = bits.shape[-1]
    full = np.zeros((*bits.shape[:-1], -(-number // WORD) * WORD), np.uint32)
    full[..., :number] = bits
    words = full.reshape(*bits.shape[:-1], -1, WORD)
    return (words << np.arange(WORD, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def unpack(words: jax.Array, number: int) -> jax.Array:
    """The first `number` bits of the last axis, as floats."""
    places = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, WORD), words.ndim)
    bits = (words[..., None] >> places) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :number].astype(jnp.float32)
