"""Statistics of unchanged linen models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatopt
import flatopt.linen
from tests import cases

RNG = np.random.default_rng(0)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 2), strides=(2, 1), name="conv")(x)
        return nn.Dense(2, name="out")(jnp.mean(jnp.tanh(x), (1, 2)))


def _by_hand(params, x):
    """The same network with patches cut out one by one."""
    kernel, padded = params["conv"]["kernel"], jnp.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
    rows = [
        jnp.stack([padded[:, i : i + 3, j : j + 2].reshape(len(x), -1) for j in range(4)], 1)
        for i in (0, 2, 4)
    ]
    seen = jnp.stack(rows, 1)
    y = seen @ kernel.reshape(-1, 3) + params["conv"]["bias"][None, None, None]
    x = jnp.mean(jnp.tanh(flatopt.tap("conv", seen, y)), (1, 2))
    out = x @ params["out"]["kernel"] + params["out"]["bias"][None]
    return flatopt.tap("out", x, out)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_convolution_has_the_statistics_of_its_patches(sharing: str):
    net, x = _Net(), jnp.asarray(RNG.normal(size=(4, 5, 4, 2)), jnp.float32)
    params = net.init(jax.random.key(0), x)["params"]
    tapped = flatopt.linen.tap_layers(lambda w, x: net.apply({"params": w}, x))
    found, expected = (
        jax.jit(flatopt.make_stats_fn(model, x, sharing=sharing).__call__)(params)
        for model in (tapped, _by_hand)
    )
    assert set(found) == {"conv", "out"}
    cases.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_projections_of_attention_are_layers_and_others_can_be_left_out():
    net, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4), jnp.ones([3, 5, 4])
    params = net.init(jax.random.key(0), x)["params"]
    tapped = flatopt.linen.tap_layers(
        lambda w, x: jnp.mean(net.apply({"params": w}, x), 1), layers=lambda name: name != "key"
    )
    found = flatopt.make_stats_fn(tapped, x)(params)
    assert set(found) == {"query", "value", "out"}
    np.testing.assert_allclose(found["query"].a, jnp.ones([5, 5]))
    assert found["out"].g.shape == (4, 4)
