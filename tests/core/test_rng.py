"""Draws for a whole tree: of the right law, independent, laid out like it, and in few sweeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from flatopt._core import rng

KEY = jax.random.key(0)
TREE = {
    "small": [jnp.zeros([40]), jnp.zeros([3, 5, 7]), jnp.zeros([])],
    "empty": jnp.zeros([0, 4]),
    "large": [jnp.zeros([rng.JOINED_SIZE + 1]), jnp.zeros([2, rng.JOINED_SIZE])],
    "complex": [jnp.zeros([50], jnp.complex64), jnp.zeros([rng.JOINED_SIZE], jnp.complex64)],
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
    draw = jax.jit(jax.vmap(lambda key: rng.normal_like(key, TREE)))
    draws = draw(jax.random.split(KEY, 20))
    for leaf in jax.tree.leaves(draws):
        if leaf.size:
            error = leaf.size**-0.5
            assert abs(jnp.mean(leaf)) < 5 * error
            assert abs(jnp.mean(jnp.abs(leaf) ** 2) - 1) < 5 * 2**0.5 * error


def test_neighbours_in_a_joined_draw_are_independent():
    pairs = jax.vmap(lambda key: rng.normal_like(key, [jnp.zeros([]), jnp.zeros([])]))
    first, second = pairs(jax.random.split(KEY, 10_000))
    assert abs(jnp.corrcoef(first, second)[0, 1]) < 0.05


def test_many_small_leaves_hold_the_generator_once():
    """Else compile time grows with the number of leaves."""

    def rounds(number: int) -> int:
        compiled = jax.jit(rng.normal_like).lower(KEY, [jnp.zeros([8])] * number).compile()
        return compiled.as_text().count(" xor(")

    assert 0 < rounds(320) == rounds(2)


# The law
EXPECTED_MOMENTS = (0, 1, 0, 3, 0, 15, 0, 105)


@pytest.mark.parametrize(
    "number", [10**6, pytest.param(10**7, marks=pytest.mark.exhaustive)], ids=["1e6", "1e7"]
)
@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_the_law_is_the_normal_one(number: int, generator: str):
    """Moments to the eighth, tails to five sigma, and the whole distribution."""
    key = jax.random.key(11, impl=generator)
    z = np.asarray(jax.jit(rng.normal_like)(key, jnp.zeros([number])), np.float64)
    double = [1]
    for k in range(1, 17):
        double.append(0 if k % 2 else double[k - 2] * (k - 1) if k > 1 else 0)
    for k, expected in enumerate(EXPECTED_MOMENTS, 1):
        error = np.sqrt((double[2 * k] - expected**2) / number)
        assert abs(np.mean(z**k) - expected) < 4 * error, k
    for sigma in (1, 2, 3, 4, 5):
        for tail in (z > sigma, z < -sigma):
            expected = number * stats.norm.sf(sigma)
            assert abs(tail.sum() - expected) < 4 * np.sqrt(expected) + 1, sigma
    assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-3


def test_the_extremes_of_the_transform():
    """Every pair of words gives a finite number, and the radius is exact to single precision."""
    ends = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    radius, angle = (jnp.asarray(x.ravel()) for x in np.meshgrid(ends, ends))
    assert np.isfinite(rng.normal_from((radius, angle))).all()
    words = np.random.default_rng(0).integers(0, 2**32, [2, 10**5], dtype=np.uint32)
    u, s = (words[0] + 0.5) / 2**32, words[1].view(np.int32) / 2**31
    exact = np.sqrt(-2 * np.log(u)) * np.sin(np.pi / 2 * s)
    found = rng.normal_from((jnp.asarray(words[0]), jnp.asarray(words[1])))
    np.testing.assert_allclose(found, exact, atol=1e-5)
    np.testing.assert_allclose(np.abs(found).max(), np.abs(exact).max(), rtol=1e-5)


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (20, (0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (20, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        (13, (0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0xFD36D048, 0x2D17272C)),
        (13, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_gives_the_known_answers(rounds, counter, key, words):
    """Those that come with its authors' Random123."""
    counter, key = (tuple(map(jnp.uint32, pair)) for pair in (counter, key))
    found = rng.threefry2x32(jnp.stack(key), counter, rounds)
    assert tuple(int(x) for x in found) == words


def test_nothing_correlates_leaves_draws_neighbours_and_replicas():
    """Nor do their squares, through which a shared radius would show."""
    size = 10**6
    steps = jax.random.split(KEY, 2)
    draw = jax.jit(lambda key: rng.normal_like(key, [jnp.zeros([size])] * 2))
    (a, b), (c, _) = (draw(key) for key in steps)
    replicas = jax.vmap(draw)(steps)[0]
    np.testing.assert_array_equal(replicas, jnp.stack([a, c]))
    shifted = {f"lag {lag}": np.roll(a, lag) for lag in (1, 2, 3, 64, 1000, 2**16)}
    for name, other in {"leaf": b, "draw": c, **shifted}.items():
        for power in (1, 2):
            x, y = np.asarray(a, float) ** power, np.asarray(other, float) ** power
            assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(size), (name, power)


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ("x", None), (None, None)])
def test_the_draws_are_the_same_on_every_layout_and_nothing_is_communicated(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jnp.zeros([512, 1024])
    expected = jax.jit(rng.normal_like)(KEY, w)
    add = jax.jit(lambda key, w: w + rng.normal_like(key, w))
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(add(KEY, placed), expected)
    text = add.lower(KEY, placed).compile().as_text()
    for communication in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert communication not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_draw_is_one_pass_with_its_use(dtype):
    """Nothing of the size of the leaf is kept, in float32 or otherwise."""
    w = jnp.zeros([512, 1024], dtype)
    add = jax.jit(lambda key, w: (w + rng.normal_like(key, w)).astype(w.dtype), donate_argnums=1)
    compiled = add.lower(KEY, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * w.nbytes
    assert compiled.cost_analysis()["bytes accessed"] < 2.01 * w.nbytes


def test_places_beyond_one_word():
    low_axis = rng._strides((3, 2**20, 2**12))
    assert low_axis == [(1, 1), (0, 2**12), (0, 1)]
    assert rng._strides((2, 3, 5)) == [(0, 15), (0, 5), (0, 1)]


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
