"""Norms over trees of many leaves: joined where they are small, and right wherever they lie."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from flatopt._core import tree_math

SHAPES = [(), (0,), (1,), (3, 5), (130, 130), (7,), (129, 127)]  # One leaf is above JOINED_SIZE.


def _leaves(number: int, seed: int, dtypes: tuple[Any, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=SHAPES[i % len(SHAPES)]), dtypes[i % len(dtypes)])
        for i in range(number)
    ]


def _exact(x: list[jax.Array], y: list[jax.Array]) -> float:
    """The inner product in numpy and double precision."""
    wide = [[np.asarray(leaf, np.complex128).ravel() for leaf in tree] for tree in (x, y)]
    return float(np.vdot(*(np.concatenate(leaves) for leaves in wide)).real)


@pytest.mark.parametrize("number", [1, 7, 33, 200])
@pytest.mark.parametrize(
    "dtypes",
    [(jnp.float32,), (jnp.bfloat16, jnp.float32), (jnp.float16,), (jnp.complex64, jnp.float32)],
    ids=["float32", "mixed", "float16", "complex"],
)
def test_products_equal_those_of_numpy(number: int, dtypes: tuple[Any, ...]):
    assert any(np.prod(shape) > tree_math.JOINED_SIZE for shape in SHAPES)
    x, y = (_leaves(number, seed, dtypes) for seed in (0, 1))
    product, norm = jax.jit(lambda x, y: (tree_math.vdot(x, y), tree_math.norm(x)))(x, y)
    scale = (_exact(x, x) * _exact(y, y)) ** 0.5
    np.testing.assert_allclose(product, _exact(x, y), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(norm, _exact(x, x) ** 0.5, rtol=1e-5)
    assert norm.dtype == product.dtype == jnp.float32


def test_trees_of_different_dtypes():
    x, y = _leaves(50, 0, (jnp.bfloat16,)), _leaves(50, 1, (jnp.float32,))
    scale = (_exact(x, x) * _exact(y, y)) ** 0.5
    np.testing.assert_allclose(tree_math.vdot(x, y), _exact(x, y), rtol=0, atol=1e-5 * scale)


def test_trees_of_different_structure_raise():
    with pytest.raises(ValueError, match=r"(?i)arity|structure|length"):
        tree_math.vdot([jnp.ones(2)] * 3, [jnp.ones(2)] * 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_leaves_that_lie_on_several_devices(kind: AxisType):
    """Some sharded, some on every device: the norm is that of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    leaves = [jnp.arange(16.0).reshape(8, 2) + i for i in range(40)]
    specs = [PartitionSpec("data") if i % 2 else PartitionSpec() for i in range(40)]
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(leaves, specs, strict=True)]
    with jax.set_mesh(mesh):
        norm = jax.jit(tree_math.norm)(placed)
    np.testing.assert_allclose(norm, _exact(leaves, leaves) ** 0.5, rtol=1e-6)


def test_small_leaves_share_their_sums():
    """The compiled program has two sums for some thirty leaves, one of them in a rare branch."""
    leaves = [jnp.ones(3 + i % 5) for i in range(320)]
    perturbation = flatopt.scale_to_norm(0.1)

    def displaced(leaves: list[jax.Array]) -> Any:
        displacement, _ = perturbation.update(leaves, perturbation.init(leaves))
        return optax.apply_updates(leaves, displacement)

    text = jax.jit(displaced).lower(leaves).as_text()
    assert 0 < text.count("stablehlo.reduce(") <= 2 * 320 // tree_math.JOINED_NUMBER


@given(exponent=st.floats(-30, 30), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_norms_of_any_scale_that_float32_holds(exponent: float, seed: int):
    x = np.random.default_rng(seed).normal(size=7) * 10.0**exponent
    x = x.astype(np.float32)
    expected = np.linalg.norm(x.astype(np.float64))
    assert float(tree_math.norm(jnp.asarray(x))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1.0, 1e10, 1e17])
def test_ordinary_norms_keep_every_bit(scale: float):
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000) * scale, jnp.float32)
    assert float(tree_math.norm(x)) == float(jnp.sqrt(tree_math.vdot(x, x)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_norm_of_zeros_that_are_known_when_compiling(dtype: str):
    """As of a mask that leaves nothing: XLA took the square of the scale, 2^180, first."""
    assert float(jax.jit(lambda: tree_math.norm(jnp.zeros(3, dtype)))()) == 0.0
    nothing = flatopt.sam_on(0.05, mask=False)
    w = jnp.ones(3, dtype)
    step = jax.jit(lambda w: nothing.update(w, nothing.init(w), w, grad_fn=lambda p, i: p)[0])
    np.testing.assert_array_equal(np.asarray(step(w), np.float32), 1.0)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_a_norm_hides_nothing(bad: float):
    assert not jnp.isfinite(tree_math.norm(jnp.array([1.0, bad])))


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e25, 1e30])
def test_the_ascent_has_its_length_whatever_the_scale_of_the_gradient(scale: float):
    w, grads = jnp.array([1.0, 1.0]), jnp.array([3.0, 4.0]) * scale
    for perturbation in (flatopt.scale_to_norm(0.1), flatopt.scale_to_adaptive_norm(0.1)):
        displacement, _ = perturbation.update(grads, perturbation.init(w), w)
        assert float(jnp.linalg.norm(displacement)) == pytest.approx(0.1, rel=1e-5)


def test_norms_on_a_mesh_gather_no_leaf():
    """Small leaves are joined before they are summed, but not those that lie on several devices."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    leaves = [jax.device_put(jnp.ones((64, 8)), sharding) for _ in range(5)]
    text = jax.jit(tree_math.norm).lower(leaves).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e25])
def test_the_orthogonal_part_is_so_at_every_size(size: float):
    to, tree = jnp.array([3.0, 4.0]) * size, jnp.array([1.0, 1.0]) * size
    found = tree_math.orthogonal(tree, to=to) / size
    np.testing.assert_allclose(found, [0.16, -0.12], rtol=1e-4)
    np.testing.assert_array_equal(tree_math.orthogonal(tree, to=jnp.zeros(2)), tree)
