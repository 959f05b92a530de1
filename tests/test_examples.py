"""The small examples run, and train as a hand-written SAM loop does."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flatopt
from examples import digits, fge, sam_linen, sam_nnx, sam_plain
from examples.models.cnn import CNN
from examples.models.transformer import ImageClassifier
from examples.models.wide_resnet import WideResNet
from tests import cases

RHO, LEARNING_RATE, MOMENTUM, STEPS = 0.1, 0.05, 0.9, 4


def _optimizer() -> optax.GradientTransformation:
    sgd = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    return optax.chain(flatopt.sam(RHO), sgd)


def _batches() -> list[tuple[jax.Array, jax.Array]]:
    data = digits.load(train_size=200)
    return list(digits.batches(data.train, STEPS, batch_size=16))


@pytest.mark.parametrize(
    ("main", "arguments", "lines"),
    [
        (sam_plain.main, ["--steps", "30"], 3),
        (sam_linen.main, ["--steps", "4"], 6),
        (sam_linen.main, ["--steps", "2", "--model", "wide_resnet"], 4),
        (sam_nnx.main, ["--steps", "4"], 7),
    ],
    ids=["sam_plain", "sam_linen", "sam_linen-wide_resnet", "sam_nnx"],
)
def test_runs_and_prints_an_accuracy(main, arguments, lines, capsys):
    main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    accuracies = [float(x) for x in re.findall(r"accuracy.*: ([\d.]+) %", "\n".join(printed))]
    assert accuracies
    assert all(0 <= a <= 100 for a in accuracies)


def test_sam_plain_learns():
    data = digits.load()
    params = sam_plain.init(jax.random.key(0))
    trained, _ = sam_plain.train(_optimizer(), params, data, 150)
    assert sam_plain.accuracy(params, data) < 0.4
    assert sam_plain.accuracy(trained, data) > 0.85


def test_digits_are_split_without_overlap():
    data = digits.load(train_size=1000)
    assert data.train[0].shape == (1000, 8, 8, 1)
    assert data.test[0].shape == (797, 8, 8, 1)
    assert float(data.train[0].max()) == 1.0
    total = sum(float(jnp.sum(part[0])) for part in data)
    everything = digits.load(train_size=1)
    np.testing.assert_allclose(
        total, sum(float(jnp.sum(part[0])) for part in everything), rtol=1e-4
    )


@jax.jit
def _ascend(params: Any, grads: Any) -> Any:
    """By hand: one global norm."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads)


@jax.jit
def _descend(params: Any, velocity: Any, grads: Any) -> tuple[Any, Any]:
    """By hand: heavy-ball momentum."""
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
    return jax.tree.map(lambda w, v: w - LEARNING_RATE * v, params, velocity), velocity


@pytest.mark.parametrize(
    "model", [CNN((4, 8), dropout=0.3), WideResNet(10, 1, dropout=0.3)], ids=["cnn", "wide_resnet"]
)
def test_linen_example_equals_a_hand_written_loop(model):
    """BatchNorm and dropout: the same parameters and statistics to 1e-5 in float32."""
    batches, key = _batches(), jax.random.key(7)
    state = sam_linen.create_state(model, _optimizer(), batches[0][0][:1])

    @jax.jit
    def gradient(params, stats, images, labels, dropout_key):
        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            one_hot = jax.nn.one_hot(labels, 10)
            return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), -1)), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    for i, (images, labels) in enumerate(batches):
        # Step by step: what rounding leaves of one would grow with the sharp steps that follow.
        params, stats = state.params, state.batch_stats
        velocity = optax.tree.get(state.opt_state, "trace")
        dropout_key = jax.random.fold_in(key, i)
        grads, new_stats = gradient(params, stats, images, labels, dropout_key)
        grads, _ = gradient(_ascend(params, grads), stats, images, labels, dropout_key)
        params, velocity = _descend(params, velocity, grads)
        state, _ = sam_linen.train_step(state, images, labels, key)
        cases.assert_close(state.params, params, rtol=1e-5, atol=1e-5)
        cases.assert_close(state.batch_stats, new_stats, rtol=1e-5, atol=1e-5)
        cases.assert_close(optax.tree.get(state.opt_state, "trace"), velocity, rtol=1e-4, atol=1e-4)


class ConvNet(nnx.Module):
    """BatchNorm and dropout in nnx."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes the layers."""
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(self.dropout(x))


def _transformer(rngs: nnx.Rngs) -> nnx.Module:
    return ImageClassifier(
        (8, 8, 1), 4, width=16, heads=2, layers=1, dropout=0.3, batch_norm=True, rngs=rngs
    )


@pytest.mark.parametrize("make", [ConvNet, _transformer], ids=["conv_net", "transformer"])
def test_nnx_example_equals_a_hand_written_loop(make):
    """BatchNorm and dropout: the same parameters, statistics and random state."""
    batches = _batches()
    model, by_hand = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, _optimizer(), wrt=nnx.Param)
    graphdef, params, rest = nnx.split(by_hand, nnx.Param, ...)
    velocity = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def gradient(params, rest, images, labels):
        def loss(params):
            module = nnx.merge(graphdef, params, rest, copy=True)
            one_hot = jax.nn.one_hot(labels, 10)
            value = -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(module(images)), -1))
            return value, nnx.split(module, nnx.Param, ...)[2]

        return jax.grad(loss, has_aux=True)(params)

    for images, labels in batches:
        sam_nnx.train_step(model, optimizer, images, labels)
        grads, new_rest = gradient(params, rest, images, labels)
        grads, _ = gradient(_ascend(params, grads), rest, images, labels)
        params, velocity = _descend(params, velocity, grads)
        rest = new_rest
    cases.assert_close(nnx.state(model, nnx.Param), params, rtol=1e-5, atol=1e-5)
    cases.assert_close(
        nnx.state(model, nnx.BatchStat), nnx.filter_state(rest, nnx.BatchStat), rtol=1e-5, atol=1e-5
    )
    cases.assert_equal(nnx.state(model, nnx.RngCount), nnx.filter_state(rest, nnx.RngCount))


def test_fast_geometric_ensembling(capsys):
    accuracy = fge.run(seeds=2, epochs=1, cycles=2)
    assert list(accuracy) == ["last model", "mean of models", "ensemble"]
    for own in accuracy.values():
        assert own.shape == (2,)
        assert ((own > 0.2) & (own <= 1)).all()  # Better than chance after one epoch.
    assert fge.main(["--seeds", "2", "--epochs", "1", "--cycles", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == list(accuracy)
    with pytest.raises(SystemExit):
        fge.main(["--seeds", "0"])
