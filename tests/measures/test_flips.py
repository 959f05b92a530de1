"""Ways and errors of binary weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures


def _signs(seed, shape=(3, 7)):
    draws = np.random.default_rng(seed).choice([-1.0, 1.0], size=(2, *shape))
    return {"a": jnp.asarray(draws[0]), "b": jnp.asarray(draws[1, 0])}


def _distance(a, b):
    return sum(
        int(jnp.sum(x != y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_path_flips_what_differs_and_never_back():
    first, second = _signs(0), _signs(1)
    size = _distance(first, second)
    points = [measures.flip_path(first, second, i / size, key=3) for i in range(size + 1)]
    for i, point in enumerate(points):
        # On a shortest way: the two distances add up to the whole.
        assert (_distance(first, point), _distance(point, second)) == (i, size - i)
    assert all(_distance(a, b) == 1 for a, b in itertools.pairwise(points))
    other = measures.flip_path(first, second, 0.5, key=4)
    assert _distance(other, measures.flip_path(first, second, 0.5, key=3)) > 0


def test_the_barrier_is_the_error_along_the_path():
    first, second = _signs(0), _signs(1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 20, 7)), jnp.float32)

    def error(params, batch):
        return jnp.mean((batch @ params["a"][0]) * (batch @ params["b"]) < 0)

    result = measures.flip_barrier(error, first, second, x, num_points=5, key=3)
    expected = [
        np.mean([error(measures.flip_path(first, second, t, key=3), batch) for batch in x])
        for t in result.positions
    ]
    np.testing.assert_allclose(result.losses, expected, atol=1e-6)
    np.testing.assert_allclose(
        result.height, measures.barrier_height(result.positions, result.losses)
    )
    # Data that only Python can read give the same, in both orders.
    for order in ("random", "greedy"):
        ways = [
            measures.flip_barrier(error, first, second, data, num_points=3, order=order).losses
            for data in (x, list(x))
        ]
        np.testing.assert_allclose(*ways, atol=1e-6)


def test_a_greedy_way_goes_round_a_hill():
    first = {"w": jnp.where(jnp.arange(16) < 8, 1.0, -1.0)}
    second = {"w": -first["w"]}

    def lean(params):
        return jnp.abs(jnp.mean(params["w"]))

    kwargs = {"num_points": 17}
    greedy = measures.flip_barrier(lean, first, second, order="greedy", **kwargs)
    random = measures.flip_barrier(lean, first, second, **kwargs)
    # One sign at a time, the mean is never further from 0 than one flip takes it.
    np.testing.assert_allclose(greedy.height, 2 / 16, atol=1e-6)
    assert random.height > greedy.height
    np.testing.assert_allclose(greedy.losses[::2], 0.0, atol=1e-6)


def test_flip_energy_flips_the_share_that_it_says():
    params = {"w": jnp.ones(40), "rest": -jnp.ones(10)}

    def error(params):
        return jnp.mean(params["w"] < 0)

    chosen = {"w": True, "rest": False}
    only = measures.flip_energy(error, params, shares=[0.0, 0.1, 0.5, 1.0], mask=chosen)
    np.testing.assert_allclose(only.energy, [0.0, 0.1, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(only.standard_error, 0.0, atol=1e-6)
    both = measures.flip_energy(error, params, shares=[0.3], num_samples=400)
    assert abs(both.energy[0] - 0.3) < 4 * both.standard_error[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, w: measures.flip_barrier(f, w, w, order="best"), "order='best'"),
        (lambda f, w: measures.flip_barrier(f, w, w[:1]), "other_params"),
        (lambda f, w: measures.flip_barrier(f, w, w, num_points=1), "num_points"),
        (lambda f, w: measures.flip_energy(f, w, shares=[1.5]), "shares"),
        (lambda f, w: measures.flip_energy(f, w, shares=0.5), "shares=0.5"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.sum, jnp.ones(3))
