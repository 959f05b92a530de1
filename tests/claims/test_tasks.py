"""The tasks of the claims: shapes, disjoint parts, label noise, and that each can be learnt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.claims import graphs, images, text
from benchmarks.claims.task import Task, drawer
from benchmarks.claims.tasks import TASKS
from benchmarks.compare.datasets import DataError

RNG = np.random.default_rng(0)
CLOTHES = (60, 20)  # Of the synthetic sets: in the training part, in the test part.
DIGITS = {"examples": 40, "valid_examples": 20, "width": 8, "batch_size": 16}
SMALL = {"examples": 30, "valid_examples": 10, "width": 8, "batch_size": 10}
OPTIONS: dict[str, dict[str, Any]] = {
    "digits_mlp": DIGITS,
    "digits_mlp_bn": DIGITS,
    "fashion_mlp": SMALL,
    "fashion_cnn": SMALL | {"width": 4},
    "cifar_resnet": SMALL | {"width": 1},
    "cora_gcn": {"examples": 30, "valid_examples": 10, "width": 8},
    "mutag_gin": SMALL,
    "proteins_gin": SMALL | {"nodes": 6},
    "nci1_gin": SMALL,
    "sst2_bag": SMALL,
    "sst2_transformer": SMALL,
    "news20_bag": SMALL,
    "shakespeare_gru": SMALL | {"length": 8},
    "shakespeare_transformer": SMALL | {"length": 8},
}


def _labels(number: int, classes: int) -> np.ndarray:
    return (np.arange(number) % classes).astype(np.uint8)


def _graphs(path: Any) -> None:
    """Rings whose nodes are called like their class; 100 of 5 nodes or of 6, one in 20 of 7."""
    sizes = np.array([7 if i % 20 == 0 else 5 + i % 2 for i in range(100)])
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    ahead = [b + np.roll(np.arange(n), -1) for b, n in zip(ends[:-1], sizes, strict=True)]
    there, nodes = np.concatenate(ahead), np.arange(ends[-1])
    order = np.argsort(np.concatenate([nodes, there]), kind="stable")
    both = np.stack([np.concatenate([nodes, there]), np.concatenate([there, nodes])])[:, order]
    labels = _labels(100, 2)
    np.savez(
        path, node_label=np.repeat(labels, sizes), edge_index=both.astype(np.int32), y=labels,
        node_ptr=ends, edge_ptr=2 * ends, fold=(np.arange(100) % 10).astype(np.int8),
    )  # fmt: skip


def _texts(path: Any, parts: dict[str, int], classes: int) -> None:
    """Texts of up to four words, of which the first says the class."""
    found: dict[str, Any] = {"vocab": np.array([str(i) for i in range(classes + 3)])}
    for part, number in parts.items():
        labels = _labels(number, classes)
        texts = [[label + 1, *([classes + 1] * (i % 4))] for i, label in enumerate(labels)]
        ends = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int32)
        found |= {f"ids_{part}": np.concatenate(texts).astype(np.uint16), f"ptr_{part}": ends}
        found[f"y_{part}"] = labels
    np.savez(path, **found)


def _papers(path: Any) -> None:
    """Papers that cite those of their class, with a word of its own."""
    labels = _labels(100, 3)
    i, j = np.nonzero((labels[:, None] == labels[None]) & ~np.eye(100, dtype=bool))
    words = (labels[:, None] == np.arange(5)).astype(np.uint8)
    edges = np.stack([i, j]).astype(np.int32)
    np.savez(path, x=words, edge_index=edges, y=labels, test_idx=np.arange(70, 100))


def _images(path: Any, shape: tuple[int, ...]) -> None:
    """Images as bright as their label says."""
    parts = {}
    for part, number in zip(("train", "test"), CLOTHES, strict=True):
        labels = _labels(number, 10)
        noise = RNG.integers(0, 10, (number, *shape))
        bright = labels.reshape(-1, *(1 for _ in shape)) * 20
        parts |= {f"x_{part}": (noise + bright).astype(np.uint8), f"y_{part}": labels}
    np.savez(path, **parts)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory):
    """Tiny files of the formats that the tasks read."""
    folder = tmp_path_factory.mktemp("data")
    _images(folder / "fashion_mnist.npz", (28, 28))
    _images(folder / "cifar10_25k.npz", (32, 32, 3))
    _papers(folder / "cora.npz")
    for name in ("mutag", "proteins", "nci1"):
        _graphs(folder / f"tu_{name}.npz")
    _texts(folder / "sst2.npz", {"train": 60, "valid": 20, "test": 20}, 2)
    _texts(folder / "news20.npz", {"train": 60, "test": 20}, 4)
    (folder / "tinyshakespeare.txt").write_text("to be, or not to be. " * 40)
    return folder


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, data_dir: Any) -> Task:
    return TASKS[request.param](data_dir, **OPTIONS[request.param])


def _leaves(inputs: Any) -> list[np.ndarray]:
    return jax.tree.leaves(inputs)


def _losses(task: Task, seeds: list[int], steps: int) -> np.ndarray:
    """The loss on all training examples before and after, a seed; all seeds at once."""
    tx = optax.adam(0.01)
    parts = [task.draw(seed).train for seed in seeds]
    inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.inputs for p in parts))
    targets = jnp.stack([p.targets for p in parts])

    def run(key: jax.Array, inputs: Any, targets: jax.Array) -> jax.Array:
        params, stats = task.init(key)

        def loss(params: Any, stats: Any) -> tuple[jax.Array, Any]:
            logits, stats = task.apply(params, stats, inputs, True)
            return task.loss(logits, targets), stats

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, stats, state = carry
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), stats, state), value

        carry, losses = jax.lax.scan(step, (params, stats, tx.init(params)), length=steps)
        logits, _ = task.apply(carry[0], carry[1], inputs, False)
        return jnp.stack([losses[0], losses[-1], task.metric(logits, targets)])

    with jax.numpy_rank_promotion("allow"):  # Flax promotes ranks.
        return np.asarray(
            jax.jit(jax.vmap(run))(jax.vmap(jax.random.key)(jnp.array(seeds)), inputs, targets)
        )


def test_the_parts_of_a_seed(task: Task):
    own, again, other = task.draw(3), task.draw(3), task.draw(4)
    jax.tree.map(np.testing.assert_array_equal, own, again)
    for mine, its in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        assert mine.shape == its.shape
        assert mine.dtype == its.dtype
    jax.tree.map(np.testing.assert_array_equal, own.test, other.test)
    assert any(
        (a != b).any() for a, b in zip(_leaves(own.train), _leaves(other.train), strict=True)
    )
    for part in own:
        assert part.targets.dtype == np.int32
        assert {len(leaf) for leaf in _leaves(part)} == {len(part.targets)}


def test_the_loss_falls(task: Task):
    before, after, _ = _losses(task, [0, 1], 20).T
    assert (after < 0.9 * before).all(), (before, after)


def test_a_convolution_is_a_product():
    for size, stride, side in ((3, 1, 5), (3, 2, 6), (1, 2, 5)):
        x = jnp.asarray(RNG.normal(size=(2, side, side, 3)), jnp.float32)
        kernel = jnp.asarray(RNG.normal(size=(size, size, 3, 4)), jnp.float32)
        dimensions = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions
        )
        np.testing.assert_allclose(images.convolve(x, kernel, stride), expected, atol=1e-5)


def test_bits_come_back():
    bits = RNG.random((3, 40)) < 0.5
    np.testing.assert_array_equal(graphs.unpack(jnp.asarray(graphs.pack(bits)), 40), bits)


def test_large_graphs_are_left_out(data_dir: Any):
    task = TASKS["proteins_gin"](data_dir, examples=30, valid_examples=10, nodes=6)
    train = task.draw(0).train.inputs
    assert train["nodes"].shape == (30, 6)
    links = np.asarray(graphs.unpack(jnp.asarray(train["links"]), 6))
    np.testing.assert_array_equal(links, links.swapaxes(1, 2))
    np.testing.assert_array_equal(links.sum(2), 2.0 * (train["nodes"] > 0))


def test_texts_are_cut_and_padded():
    found = text.padded(np.array([0, 3, 9, 2, 1]), np.array([0, 4, 4, 5]), 3, vocabulary=4)
    assert found.tolist() == [[1, 4, 1], [0, 0, 0], [2, 0, 0]]


NUMBERS = np.arange(100)[:, None]
TARGETS = (np.arange(100) % 4).astype(np.int32)


def _drawn(**options: Any) -> Callable[[int], Any]:
    test = np.arange(70, 100)
    return drawer(NUMBERS, TARGETS, test, **({"examples": 40, "valid_examples": 20} | options))


@pytest.mark.parametrize("options", [{}, {"valid_rows": np.arange(60, 70), "valid_examples": 10}])
def test_parts_are_disjoint(options: dict[str, Any]):
    for seed in range(5):
        train, valid, test = (part.inputs[:, 0] for part in _drawn(**options)(seed))
        assert len(set(train)) == 40
        assert len(set(valid)) == options.get("valid_examples", 20)
        assert not set(train) & set(valid)
        assert set(test) == set(range(70, 100))
        assert not set(test) & (set(train) | set(valid))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_label_noise_is_on_training_labels_alone(share: float):
    found = _drawn(label_noise=share)(0)
    wrong = [part.targets != TARGETS[part.inputs[:, 0]] for part in found]
    assert [int(w.sum()) for w in wrong] == [round(share * 40), 0, 0]
    clean = _drawn()(0)
    np.testing.assert_array_equal(found.train.inputs, clean.train.inputs)
    assert found.train.targets.max() < 4


def test_balanced():
    for seed in range(3):
        labels = _drawn(balanced=True)(seed).train.targets
        assert np.bincount(labels).tolist() == [10] * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"examples": 51}, "examples=51 must be in 1 .. 50"),
        ({"examples": 0}, "examples=0 must be in 1 .. 50"),
        ({"label_noise": 1.0}, "label_noise=1.0 must be in"),
    ],
)
def test_errors(options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        _drawn(**options)


def test_data_that_is_not_there(tmp_path: Any):
    with pytest.raises(DataError):
        TASKS["fashion_mlp"](tmp_path)
