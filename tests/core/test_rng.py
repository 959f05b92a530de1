"""Draws for a whole tree: independent, laid out like it, and in few sweeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt._core import rng, tree_math

KEY = jax.random.key(0)
TREE = {
    "small": [jnp.zeros([40]), jnp.zeros([3, 5, 7]), jnp.zeros([])],
    "empty": jnp.zeros([0, 4]),
    "large": [jnp.zeros([tree_math.JOINED_SIZE + 1]), jnp.zeros([2, tree_math.JOINED_SIZE])],
    "complex": [jnp.zeros([50], jnp.complex64), jnp.zeros([tree_math.JOINED_SIZE], jnp.complex64)],
}


def _flat(draws: object) -> np.ndarray:
    parts = [np.ravel(x) for x in jax.tree.leaves(draws)]
    return np.concatenate([np.r_[x.real, x.imag] if np.iscomplexobj(x) else x for x in parts])


@pytest.mark.parametrize("draw", [rng.normal_like, rng.uniform_like])
def test_every_entry_is_drawn_anew(draw):
    tree = TREE if draw is rng.normal_like else {**TREE, "complex": []}
    draws = jax.jit(draw)(KEY, tree)
    assert jax.tree.map(jnp.shape, draws) == jax.tree.map(jnp.shape, tree)
    values = _flat(draws)
    # Of 2^24 different floats a few meet by chance, and no more.
    assert np.unique(values).size > 0.99 * values.size
    assert not np.array_equal(_flat(draw(jax.random.key(1), tree)), values)


def test_normal_draws_have_unit_variance_in_every_leaf():
    draws = jax.vmap(lambda key: rng.normal_like(key, TREE))(jax.random.split(KEY, 400))
    for leaf in jax.tree.leaves(draws):
        if leaf.size:
            error = leaf.size**-0.5
            assert abs(jnp.mean(leaf)) < 5 * error
            assert abs(jnp.mean(jnp.abs(leaf) ** 2) - 1) < 5 * 2**0.5 * error


def test_neighbours_in_a_joined_draw_are_independent():
    pairs = jax.vmap(lambda key: rng.normal_like(key, [jnp.zeros([]), jnp.zeros([])]))
    first, second = pairs(jax.random.split(KEY, 10_000))
    assert abs(jnp.corrcoef(first, second)[0, 1]) < 0.05


def test_many_small_leaves_are_drawn_in_few_sweeps():
    tree = [jnp.zeros([8])] * 320
    text = str(jax.make_jaxpr(rng.normal_like)(KEY, tree))
    assert 0 < text.count("erf_inv") <= 320 // tree_math.JOINED_NUMBER


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_stream_draws_with_the_generator_of_its_key(generator: str):
    stream = rng.Stream(jax.random.key(3, impl=generator))
    data = stream.init()
    assert data.dtype == jnp.uint32
    keep, use = stream.split(data)
    assert jax.random.key_impl(use) == generator
    assert keep.shape == data.shape


@pytest.mark.parametrize("bad", ["seed", 0.5, jnp.zeros(2)])
def test_what_is_no_key_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"key=.* must be an int seed, a key from jax.random.key"):
        rng.Stream(bad)
