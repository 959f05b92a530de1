"""ZSharp."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.zsharp(RHO, quantile=0.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


def test_it_keeps_the_share_of_each_leaf_that_stands_out():
    grads = {"a": jnp.arange(100.0) ** 2, "b": -(jnp.arange(40.0) ** 3)}
    direction = flatopt.keep_large_zscores(0.9)
    kept, _ = direction.update(grads, direction.init(grads))
    for name, leaf in kept.items():
        assert int((leaf != 0).sum()) == leaf.size // 10
        np.testing.assert_array_equal(leaf[leaf != 0], grads[name][leaf != 0])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("size", [50, 10_000])  # Small leaves are sorted, large ones counted.
def test_what_is_not_finite_shows_in_the_displacement(bad, size):
    """Filtered out, it would be hidden from `optax.apply_if_finite`."""
    grads = {"a": jnp.linspace(-1.0, 2.0, size).at[3].set(bad), "b": jnp.arange(4.0)}
    perturbation = optax.chain(flatopt.keep_large_zscores(0.95), flatopt.scale_to_norm(RHO))
    displacement, _ = perturbation.update(grads, perturbation.init(grads))
    assert not np.isfinite(optax.tree.norm(displacement))


def test_no_schedule_of_the_quantile():
    with pytest.raises(TypeError, match=r"quantile=.* A schedule is not taken here"):
        flatopt.zsharp(RHO, quantile=optax.constant_schedule(0.5))
