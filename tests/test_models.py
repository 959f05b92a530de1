"""The models of the examples: shapes, gradients to every parameter, what training mode changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from examples.models.cnn import CNN
from examples.models.gcn import GCN, normalised_adjacency
from examples.models.mlp import MLP
from examples.models.transformer import ImageClassifier, LanguageModel
from examples.models.wide_resnet import WideResNet

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(6, 8, 8, 3)), jnp.float32)
NODES = 12
FEATURES = jnp.asarray(RNG.normal(size=(NODES, 5)), jnp.float32)
UPPER = np.triu(RNG.random((NODES, NODES)) < 0.3, 1)
ADJACENCY = jnp.asarray(UPPER | UPPER.T, jnp.float32)

LINEN = {
    "mlp": (MLP((16,), 4), (IMAGES.reshape(6, -1),), (6, 4)),
    "cnn": (CNN((4, 8), 4), (IMAGES,), (6, 4)),
    "wide_resnet": (WideResNet(10, 1, classes=4, dropout=0.1), (IMAGES,), (6, 4)),
    "gcn": (GCN((8,), 4), (FEATURES, normalised_adjacency(ADJACENCY)), (NODES, 4)),
}


def _train_mode(model: nn.Module) -> dict[str, bool]:
    return {} if isinstance(model, MLP) else {"train": True}


@pytest.mark.parametrize("name", LINEN)
def test_linen_shapes_and_gradients_to_every_parameter(name: str):
    model, inputs, shape = LINEN[name]
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    assert model.apply(variables, *inputs).shape == shape
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    labels = jnp.arange(shape[0]) % shape[1]

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, **rest},
            *inputs,
            **_train_mode(model),
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    norms = jax.tree.map(jnp.linalg.norm, gradient(params))
    assert all(0 < float(norm) < np.inf for norm in jax.tree.leaves(norms))


@pytest.mark.parametrize("name", ["cnn", "wide_resnet"])
def test_batch_norm_statistics_change_in_training_only(name: str):
    model, inputs, _ = LINEN[name]
    variables = model.init(jax.random.key(0), *inputs)
    rngs = {"dropout": jax.random.key(1)}
    for train in (False, True):
        _, new = model.apply(variables, *inputs, train, mutable=["batch_stats"], rngs=rngs)
        equal = jax.tree.map(np.array_equal, new["batch_stats"], variables["batch_stats"])
        assert not any(jax.tree.leaves(equal)) if train else all(jax.tree.leaves(equal))


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(16, 4, 2.75), (28, 10, 36.5)], ids=["WRN-16-4", "WRN-28-10"]
)
def test_wide_resnets_have_the_published_sizes(depth: int, width: int, millions: float):
    model = WideResNet(depth, width)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    number = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["params"]))
    np.testing.assert_allclose(number / 1e6, millions, rtol=5e-3)


def test_wide_resnet_of_an_impossible_depth_raises():
    with pytest.raises(ValueError, match=r"depth=17 must be 6 n \+ 4"):
        WideResNet(17, 1).init(jax.random.key(0), IMAGES)


def test_wide_resnet_in_bfloat16_keeps_float32_parameters():
    model = WideResNet(10, 1, dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), IMAGES)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"float32"}
    assert model.apply(variables, IMAGES).dtype == jnp.float32


def _image_classifier() -> nnx.Module:
    return ImageClassifier((8, 8, 3), 4, classes=4, width=16, heads=2, layers=2, rngs=nnx.Rngs(0))


def _language_model() -> nnx.Module:
    return LanguageModel(11, 9, width=16, heads=2, layers=2, rngs=nnx.Rngs(0))


TOKENS = jnp.asarray(RNG.integers(11, size=(3, 9)))


@pytest.mark.parametrize(
    ("make", "inputs", "shape"),
    [(_image_classifier, IMAGES, (6, 4)), (_language_model, TOKENS, (3, 9, 11))],
    ids=["image_classifier", "language_model"],
)
def test_nnx_shapes_and_gradients_to_every_parameter(make, inputs, shape):
    model = make()
    labels = jnp.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]

    def loss_fn(model: nnx.Module) -> jax.Array:
        logits = model(inputs)
        assert logits.shape == shape
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    norms = jax.tree.map_with_path(
        lambda path, g: (str(path), float(jnp.linalg.norm(g))), nnx.grad(loss_fn)(model)
    )
    for path, norm in jax.tree.leaves(norms, is_leaf=lambda x: isinstance(x, tuple)):
        # Softmax does not see what a key's bias adds to all scores of a query.
        assert norm < np.inf
        assert norm > 0 or "'key'" in path, path


def test_language_model_looks_at_earlier_tokens_only():
    model = _language_model()
    model.eval()
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 11)
    before, after = model(TOKENS), model(changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    assert float(jnp.abs(after[:, 5:] - before[:, 5:]).min(-1).max()) > 1e-6


def test_dropout_acts_in_training_only():
    model = _image_classifier()
    assert not np.array_equal(model(IMAGES), model(IMAGES))
    model.eval()
    np.testing.assert_array_equal(model(IMAGES), model(IMAGES))


def test_normalised_adjacency_by_hand():
    path = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    a, b = 1 / 2, 1 / np.sqrt(6)
    expected = [[a, b, 0], [b, 1 / 3, b], [0, b, a]]
    np.testing.assert_allclose(normalised_adjacency(path), expected, rtol=1e-6)
    np.testing.assert_allclose(normalised_adjacency(path + jnp.eye(3)), expected, rtol=1e-6)


def test_nodes_hear_from_neighbours_only():
    """Two layers carry a feature two edges far."""
    number = 6
    line = jnp.eye(number, k=1) + jnp.eye(number, k=-1)
    model, x = GCN((8,), 4), jnp.ones((number, 5))
    variables = model.init(jax.random.key(0), x, normalised_adjacency(line))
    out = [model.apply(variables, y, normalised_adjacency(line)) for y in (x, x.at[0].set(2.0))]
    moved = np.abs(out[1] - out[0]).max(1) > 1e-6
    np.testing.assert_array_equal(moved, [True, True, True, False, False, False])
