"""How much a batch counts, whatever else it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flatopt
import flatopt.linen
import flatopt.nnx
from flatopt import curves, landscape, measures

X = np.arange(1.0, 11.0, dtype=np.float32)
CUTS = [(0, 8), (8, 10)]
W = jnp.ones(1)
EXTRAS = {
    "nothing": {},
    "scalar": {"epoch": jnp.array(3)},
    "class weights": {"class_weights": jnp.ones(3)},
    "bias": {"bias": jnp.zeros((1, 4))},
    "key": {"a_key": jax.random.PRNGKey(0)},
}


def _loss(w, batch):
    return jnp.mean(0.5 * batch["x"] * jnp.sum(w**2))


def _batches(extra):
    return [{**extra, "x": jnp.asarray(X[a:b])} for a, b in CUTS]


MEASURES = {
    "product": lambda b, **k: measures.hessian_vector_product(_loss, W, W, b, **k)[0],
    "eigenvalue": lambda b, **k: measures.top_eigenvalues(_loss, W, b, **k).values[0],
    "trace": lambda b, **k: measures.trace(_loss, W, b, **k).value,
    "gradient": lambda b, **k: measures.gradient_norm(_loss, W, b, **k),
    "barrier": lambda b, **k: 2 * measures.linear_barrier(_loss, W, -W, b, **k).losses[0],
    "line": lambda b, **k: 2 * landscape.line(_loss, W, W, b, positions=[0.0], **k)[1][0],
    "curve": lambda b, **k: (
        2 * curves.evaluate(_loss, jnp.ones((2, 1)), b, positions=[0.0], **k)[1][0]
    ),
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_batches_count_by_their_examples_whatever_else_they_hold(measure, extra):
    np.testing.assert_allclose(measure(_batches(extra)), X.mean(), rtol=1e-6)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_weights_are_taken_as_given(measure):
    means = [X[a:b].mean() for a, b in CUTS]
    for batches in (_batches({}), lambda: iter(_batches({}))):
        value = measure(batches, weights=[1, 3])
        np.testing.assert_allclose(value, (means[0] + 3 * means[1]) / 4, rtol=1e-6)
    stacked = {"x": jnp.asarray(X.reshape(2, 5))}
    value = measure(stacked, weights=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(value, (3.0 + 3 * 8.0) / 4, rtol=1e-6)


def test_what_cannot_be_told_is_refused():
    ragged = [{"x": jnp.ones(8), "y": jnp.ones(20)}, {"x": jnp.ones(2), "y": jnp.ones(11)}]
    with pytest.raises(ValueError, match=r"cannot be told.*weights="):
        measures.gradient_norm(_loss, W, ragged)
    assert measures.gradient_norm(_loss, W, ragged, weights=[8, 2]) == 1
    for weights in ([1], [1, 2, 3]):
        for batches in (ragged, {"x": jnp.ones((2, 5))}):
            with pytest.raises(ValueError, match="give one number a batch"):
                measures.gradient_norm(_loss, W, batches, weights=weights)
    for weights in ([1, -1], [0, 0], [[1, 2]], [1, np.nan]):
        with pytest.raises(ValueError, match=r"weights=.*one a batch"):
            measures.gradient_norm(_loss, W, ragged, weights=weights)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, batch, train):
        return nn.BatchNorm(use_running_average=not train)(batch["x"][:, None])


class Nnx(nnx.Module):
    def __init__(self):  # noqa: D107
        self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def __call__(self, batch):
        return self.norm(batch["x"][:, None])


def _linen(batches, **kwargs):
    variables = Linen().init(jax.random.key(0), batches[0], train=False)
    stats = flatopt.linen.recompute_batch_stats(Linen(), variables, batches, train=True, **kwargs)
    return stats["BatchNorm_0"]["mean"][0], stats["BatchNorm_0"]["var"][0]


def _nnx(batches, **kwargs):
    norm = flatopt.nnx.recompute_batch_stats(Nnx(), batches, **kwargs).norm
    return norm.mean[...][0], norm.var[...][0]


@pytest.mark.parametrize("recompute", [_linen, _nnx])
def test_statistics_count_examples_whatever_else_a_batch_holds(recompute):
    for extra in EXTRAS.values():
        np.testing.assert_allclose(recompute(_batches(extra))[0], X.mean(), rtol=1e-6)
    means = [X[a:b].mean() for a, b in CUTS]
    weighted = recompute(_batches({}), weights=[1, 3])[0]
    np.testing.assert_allclose(weighted, (means[0] + 3 * means[1]) / 4, rtol=1e-6)


@pytest.mark.parametrize("recompute", [_linen, _nnx])
def test_variances_are_those_that_a_layer_normalises_with(recompute):
    """PyTorch's `update_bn` has the same mean, and n / (n - 1) times each batch's variance."""
    mean, var = recompute(_batches({}), sample_weighted=False)
    parts = [X[a:b] for a, b in CUTS]
    np.testing.assert_allclose(mean, np.mean([p.mean() for p in parts]), rtol=1e-6)
    np.testing.assert_allclose(var, np.mean([p.var() for p in parts]), rtol=1e-5)
    unbiased = np.mean([p.var() * len(p) / (len(p) - 1) for p in parts])
    np.testing.assert_allclose(unbiased, np.mean([p.var(ddof=1) for p in parts]), rtol=1e-6)
    assert unbiased > var
