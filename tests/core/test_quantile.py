"""Quantiles, and the largest entries, by counting are those of a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
