"""BatchNorm statistics recomputed for given weights: exact means, nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from flatopt.linen import recompute_batch_stats as linen_recompute
from flatopt.nnx import recompute_batch_stats as nnx_recompute
from tests import cases

BATCHES = [np.random.default_rng(size).normal(size=(size, 4)).astype("f") for size in (7, 11, 6)]


class Model(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool):
        for width in (8, 5):
            x = nn.Dense(width)(x)
            x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        return nn.Dense(2)(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):  # noqa: D107
        self.dense = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)])
        self.norm = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in (8, 5)])
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        for dense, norm in zip(self.dense, self.norm, strict=True):
            x = nnx.tanh(norm(dense(x)))
        return self.dropout(x)


def _variables(seed=0):
    return Model().init(jax.random.key(seed), BATCHES[0], train=True)


def _by_hand(variables, weights):
    """The layers' means and variances, computed layer by layer and averaged with numpy."""
    params, seen = variables["params"], []
    for x in BATCHES:
        found = {}
        for i in range(2):
            dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
            x = np.asarray(x @ dense["kernel"] + dense["bias"][None], np.float64)
            found[f"BatchNorm_{i}"] = {"mean": x.mean(0), "var": x.var(0)}
            x = (x - x.mean(0)[None]) / np.sqrt(x.var(0) + 1e-5)[None]
            x = np.tanh(x * norm["scale"][None] + norm["bias"][None])
        seen.append(found)
    shares = np.asarray(weights) / np.sum(weights)
    return jax.tree.map(lambda *s: sum(w * v for w, v in zip(shares, s, strict=True)), *seen)


@pytest.mark.parametrize(("sample_weighted", "weights"), [(True, (7, 11, 6)), (False, (1, 1, 1))])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_linen_statistics_are_the_exact_mean(momentum, sample_weighted, weights):
    variables = _variables()
    stats = linen_recompute(
        Model(momentum), variables, BATCHES, sample_weighted=sample_weighted, train=True
    )
    cases.assert_close(stats, _by_hand(variables, weights), rtol=1e-5)


def test_linen_leaves_the_training_state_alone():
    variables = _variables()
    before = jax.tree.map(np.array, variables)
    stats = linen_recompute(Model(), variables, BATCHES, train=True)
    cases.assert_equal(variables, before)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    # The old statistics do not matter: not even these.
    spoilt = {
        **variables,
        "batch_stats": jax.tree.map(lambda s: s * jnp.nan, before["batch_stats"]),
    }
    cases.assert_equal(linen_recompute(Model(), spoilt, BATCHES, train=True), stats)


def test_linen_under_jit_and_vmap_over_replicas():
    variables = [_variables(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *variables)
    many = jax.jit(jax.vmap(lambda v: linen_recompute(Model(), v, BATCHES, train=True)))(stacked)
    for i, own in enumerate(variables):
        one = linen_recompute(Model(), own, BATCHES, train=True)
        cases.assert_close(jax.tree.map(lambda x, i=i: x[i], many), one)


def test_linen_keeps_what_is_no_batch_norm():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)
            return nn.BatchNorm(use_running_average=not train)(x)

    variables = Mixed().init(jax.random.key(0), BATCHES[0], train=True)
    stats = linen_recompute(Mixed(), variables, BATCHES, train=True)
    cases.assert_equal(stats["SpectralNorm_0"], variables["batch_stats"]["SpectralNorm_0"])
    changed = stats["BatchNorm_0"]["mean"] - variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.abs(changed).max()) > 0


def test_linen_says_what_is_wrong():
    variables = _variables()
    with pytest.raises(ValueError, match=r"BatchNorm_0 uses its running averages.*train=True"):
        linen_recompute(Model(), variables, BATCHES, train=False)
    with pytest.raises(ValueError, match="batches is empty"):
        linen_recompute(Model(), variables, [], train=True)
    with pytest.raises(ValueError, match="momentum=1"):
        linen_recompute(Model(1.0), variables, BATCHES, train=True)
    plain = nn.Dense(2)
    with pytest.raises(ValueError, match=r"no nn\.BatchNorm"):
        linen_recompute(
            plain, plain.init(jax.random.key(0), BATCHES[0]) | {"batch_stats": {}}, BATCHES
        )


def _numbers(model):
    states = nnx.state(model, nnx.Param, nnx.BatchStat)
    return jax.tree.map(np.array, [nnx.to_pure_dict(state) for state in states])


def _as_linen(model):
    params = {}
    for i in range(2):
        dense, norm = model.dense[i], model.norm[i]
        params[f"Dense_{i}"] = {"kernel": dense.kernel[...], "bias": dense.bias[...]}
        params[f"BatchNorm_{i}"] = {"scale": norm.scale[...], "bias": norm.bias[...]}
    return {"params": params}


@pytest.mark.parametrize(("sample_weighted", "weights"), [(True, (7, 11, 6)), (False, (1, 1, 1))])
def test_nnx_statistics_are_the_exact_mean(sample_weighted, weights):
    model = NnxModel(nnx.Rngs(0))
    model.eval()
    before = _numbers(model)
    new = nnx_recompute(model, BATCHES, sample_weighted=sample_weighted)
    expected = _by_hand(_as_linen(model), weights)
    for i in range(2):
        cases.assert_close(new.norm[i].mean[...], expected[f"BatchNorm_{i}"]["mean"], rtol=1e-5)
        cases.assert_close(new.norm[i].var[...], expected[f"BatchNorm_{i}"]["var"], rtol=1e-5)
        assert new.norm[i].momentum == 0.9
        assert new.norm[i].use_running_average  # In the mode that the model was in.
    cases.assert_equal(_numbers(model), before)


SIZES = (16, 16, 8)  # Batches whose last one is short.
IMAGES = [
    np.random.default_rng(7 + i).normal(size=(n, 3, 2, 4)).astype("f") for i, n in enumerate(SIZES)
]


def _torch_update_bn(batches):
    """PyTorch's `update_bn`, by its formula: a cumulative mean, one batch after another.

    BatchNorm2d with `momentum=None` takes in batch k with the share 1 / k: its mean, and its
    variance over n - 1 of its n values a channel.
    """
    mean, var = np.zeros(batches[0].shape[-1]), np.ones(batches[0].shape[-1])
    for k, x in enumerate(batches, start=1):
        values = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        n = len(values)
        unbiased = np.sum((values - values.mean(0)) ** 2, axis=0) / (n - 1)
        mean = mean + (values.mean(0) - mean) / k
        var = var + (unbiased - var) / k
    return mean, var


def _recomputed_linen(batches, axis=-1, **kwargs):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, axis=axis)(x)

    variables = Norm().init(jax.random.key(0), batches[0], train=False)
    stats = linen_recompute(Norm(), variables, batches, train=True, **kwargs)["BatchNorm_0"]
    return stats["mean"], stats["var"]


def _recomputed_nnx(batches, axis=-1, **kwargs):
    norm = nnx.BatchNorm(batches[0].shape[axis], axis=axis, rngs=nnx.Rngs(0))
    new = nnx_recompute(nnx.Sequential(norm), batches, **kwargs).layers[0]
    assert new.promote_dtype is norm.promote_dtype
    return new.mean[...], new.var[...]


@pytest.mark.parametrize("recomputed", [_recomputed_linen, _recomputed_nnx])
@pytest.mark.parametrize("flat", [True, False], ids=["dense", "images"])
def test_unbiased_and_batch_by_batch_it_is_pytorch_s_update_bn(recomputed, flat):
    batches = [x[:, 0, 0] for x in IMAGES] if flat else IMAGES
    mean, var = _torch_update_bn(batches)
    found = recomputed(batches, sample_weighted=False, unbiased=True)
    np.testing.assert_allclose(found[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], var, rtol=1e-5)
    biased = recomputed(batches, sample_weighted=False)[1]
    assert np.abs(biased - var).max() > (0.02 if flat else 0.002)


@pytest.mark.parametrize("recomputed", [_recomputed_linen, _recomputed_nnx])
def test_unbiased_variances_of_channels_on_another_axis(recomputed):
    last = recomputed(IMAGES, unbiased=True)
    first = recomputed([np.moveaxis(x, -1, 1) for x in IMAGES], axis=1, unbiased=True)
    cases.assert_close(first, last, rtol=1e-5)


@pytest.mark.parametrize("recomputed", [_recomputed_linen, _recomputed_nnx])
def test_one_value_has_no_unbiased_variance(recomputed):
    with pytest.raises(ValueError, match="one value a channel"):
        recomputed([np.ones((4, 2), "f"), np.ones((1, 2), "f")], unbiased=True)


def test_nnx_says_what_is_wrong():
    with pytest.raises(ValueError, match="batches is empty"):
        nnx_recompute(NnxModel(nnx.Rngs(0)), [])
    with pytest.raises(ValueError, match=r"no nnx\.BatchNorm"):
        nnx_recompute(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), BATCHES)
