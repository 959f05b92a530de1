"""Quantiles, and the largest entries, by counting are those of a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatopt._core import quantile as _quantile

SIZE = 2 * _quantile.SORTED_SIZE + 1


def _entries(kind: str) -> jax.Array:
    rng = np.random.default_rng(0)
    x = {
        "normal": np.abs(rng.normal(size=SIZE)),
        "ties": rng.integers(0, 5, SIZE),
        "equal": np.full(SIZE, 0.3),
        "zeros": np.zeros(SIZE),
        "wide range": 10.0 ** rng.uniform(-30, 30, SIZE),
        "one infinite": np.r_[np.inf, np.abs(rng.normal(size=SIZE - 1))],
    }[kind]
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.333, 0.95, 0.9999])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "wide range", "one infinite"])
def test_equals_a_sort(kind: str, q: float):
    x = _entries(kind)
    np.testing.assert_allclose(
        jax.jit(_quantile.quantile)(x, q), jnp.quantile(x, q), rtol=1e-6 if q else 0
    )


@pytest.mark.parametrize("number", [0, 1, SIZE // 3, SIZE - 1, SIZE])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "wide range", "one infinite"])
def test_the_largest_are_those_of_a_stable_sort(kind: str, number: int):
    x = _entries(kind)
    expected = np.zeros(SIZE, bool)
    expected[np.argsort(-x, stable=True)[:number]] = True
    np.testing.assert_array_equal(jax.jit(_quantile.largest)(x, number), expected)


@pytest.mark.parametrize("number", [0, 7, 30, 40])
def test_the_largest_of_a_tree_on_a_mesh_are_those_on_one_device(number: int):
    """Counted leaf by leaf there; of equal entries the first ones, in the order of the leaves."""
    rng = np.random.default_rng(1)
    shapes = {"a": (8, 3), "b": (), "c": (2, 1, 4), "d": (0,), "e": (7,)}
    tree = {k: jnp.asarray(rng.integers(0, 4, s), jnp.float32) for k, s in shapes.items()}
    expected = _quantile.largest_in_tree(tree, number)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        specs = {k: PartitionSpec("d") if k == "a" else PartitionSpec() for k in shapes}
        with jax.set_mesh(mesh):
            placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
            found = jax.jit(_quantile.largest_in_tree)(placed, number)
        for k in shapes:
            np.testing.assert_array_equal(found[k], expected[k])
            assert found[k].sharding.is_equivalent_to(placed[k].sharding, placed[k].ndim)


def test_nan_is_less_than_all_others():
    x = jnp.array([jnp.nan, 0.0, jnp.nan, 2.0, jnp.inf])
    for number, chosen in enumerate([[], [4], [3, 4], [1, 3, 4], [0, 1, 3, 4], range(5)]):
        np.testing.assert_array_equal(np.flatnonzero(_quantile.largest(x, number)), chosen)


def test_double_precision():
    with jax.enable_x64(True):
        x = jnp.asarray(np.abs(np.random.default_rng(0).normal(size=SIZE)))
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(
            _quantile.quantile(x, 0.777), np.quantile(np.asarray(x), 0.777), rtol=1e-14
        )


def test_double_precision_of_the_largest():
    with jax.enable_x64(True):
        assert _quantile.largest(jnp.array([1.0, 1.0 + 1e-15]), 1).tolist() == [False, True]


def test_under_vmap():
    x = _entries("normal")
    q = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        jax.vmap(_quantile.quantile, in_axes=(None, 0))(x, q), jnp.quantile(x, q), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("function", "argument"), [(_quantile.quantile, 0.5), (_quantile.largest, SIZE // 2)]
)
def test_nothing_is_sorted(function: Callable[..., jax.Array], argument: float):
    text = jax.jit(function).lower(_entries("normal"), argument).as_text()
    assert "sort" not in text
    assert "while" in text
