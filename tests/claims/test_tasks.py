"""The tasks of the claims: shapes, disjoint parts, label noise, and that each can be learnt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
}


def _labels(number: int, classes: int) -> np.ndarray:
    return (np.arange(number) % classes).astype(np.uint8)


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
