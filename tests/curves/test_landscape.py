"""Directions, planes, projections, grids; and that the plots draw what they are given."""

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from flatopt import landscape, measures, plots
from tests.measures import problem


def test_directions_are_filter_normalised():
    shapes = {"dense": (5, 3), "conv": (3, 3, 2, 4), "bias": (3,), "scale": ()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["dense"] = params["dense"].at[:, 1].set(0.0)  # A dead filter does not move.
    direction = landscape.random_direction(jax.random.key(1), params)
    for name in ("dense", "conv"):
        flat = [np.reshape(tree[name], (-1, shapes[name][-1])) for tree in (direction, params)]
        np.testing.assert_allclose(*(np.linalg.norm(f, axis=0) for f in flat), rtol=1e-5)
        assert not np.allclose(*flat)
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(direction[name], np.zeros(shapes[name]))
    # Twice the weights, twice the direction: the picture does not depend on their scale.
    doubled = landscape.random_direction(1, optax.tree.scale(2.0, params))
    for one, two in zip(jax.tree.leaves(direction), jax.tree.leaves(doubled), strict=True):
        np.testing.assert_allclose(2 * one, two, rtol=1e-5)


def test_other_normalisations():
    params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([2.0])}
    by_leaf = landscape.random_direction(0, params, "leaf")
    lengths = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(by_leaf)]
    np.testing.assert_allclose(lengths, [2.0, 5.0], rtol=1e-5)
    plain = landscape.random_direction(0, params, "none")
    np.testing.assert_array_equal(
        plain["bias"], landscape.random_direction(0, optax.tree.scale(2.0, params), "none")["bias"]
    )


def _three():
    return [problem.params(seed, jnp.float32) for seed in range(3)]


def test_plane_through_three_networks():
    networks = _three()
    where = landscape.plane_through(*networks)
    u, v = where.directions
    np.testing.assert_allclose(
        [optax.tree.vdot(u, u), optax.tree.vdot(v, v), optax.tree.vdot(u, v)], [1, 1, 0], atol=1e-5
    )
    for params, corner in zip(networks, where.coordinates, strict=True):
        place = jax.tree.map(lambda o, a, b, c=corner: o + c[0] * a + c[1] * b, where.origin, u, v)
        for one, two in zip(jax.tree.leaves(place), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
        np.testing.assert_allclose(landscape.project(params, where), corner, atol=1e-4)
    data = problem.batches(dtype=jnp.float32)
    xs, ys = where.coordinates[:, 0], where.coordinates[:, 1]
    losses = landscape.plane(problem.loss_fn, where, data, xs=xs, ys=ys)
    whole = problem.flat_data(data)
    for i, params in enumerate(networks):  # The corners lie on the diagonal of this grid.
        np.testing.assert_allclose(losses[i, i], problem.loss_fn(params, whole), rtol=1e-4)


@pytest.mark.parametrize("form", ["chunk", "list", "progress", "jit"])
def test_ways_to_compute_a_plane_agree(form, capsys):
    networks, data = _three(), problem.batches(dtype=jnp.float32)
    where = landscape.plane_through(*networks)
    arguments = {"xs": np.linspace(-1, 1, 4), "ys": np.linspace(0, 1, 3)}
    expected = landscape.plane(problem.loss_fn, where, data, **arguments)
    assert expected.shape == (3, 4)
    if form == "jit":
        found = jax.jit(lambda w: landscape.plane(problem.loss_fn, w, data, **arguments))(where)
    else:
        changes = {
            "chunk": {"chunk": 5},
            "list": {"batches": [problem.flat_data(data)]},
            "progress": {"progress": True},
        }[form]
        call = {"batches": data, **arguments, **changes}
        found = landscape.plane(problem.loss_fn, where, **call)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert ("landscape" in capsys.readouterr().err) == (form == "progress")


def test_projection_onto_slanted_directions():
    rng = np.random.default_rng(0)
    origin, u, v = (problem.params(s, jnp.float32) for s in range(3))
    v = optax.tree.add_scale(v, 0.7, u)
    where = landscape.Plane(origin, (u, v))
    place = jax.tree.map(lambda o, a, b: o + 2.0 * a - 3.0 * b, origin, u, v)
    np.testing.assert_allclose(landscape.project(place, where), [2, -3], rtol=1e-4)
    path = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(7, *x.shape))), origin)
    assert jax.vmap(lambda p: landscape.project(p, where))(path).shape == (7, 2)


def test_eigenvectors_as_directions_show_the_curvature():
    loss, _, params = problem.quadratic(np.r_[4.0, 2.0, np.zeros(5)])
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    result = measures.top_eigenvalues(loss, params, k=2)
    first, second = (jax.tree.map(lambda x, i=i: x[i], result.vectors) for i in range(2))
    losses = landscape.plane(
        loss, landscape.Plane(params, (first, second)), xs=[0.0, 1.0], ys=[0.0, 1.0]
    )
    np.testing.assert_allclose(losses, [[0, 2], [1, 3]], atol=1e-4)


def test_what_overflows_is_not_hidden():
    positions, losses = landscape.line(
        lambda w: jnp.log(1 - jnp.sum(w)), jnp.zeros(1), jnp.ones(1), positions=[0.0, 2.0]
    )
    assert positions.shape == (2,)
    assert np.isnan(losses[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: landscape.random_direction(0, jnp.ones(2), "best"), "normalisation='best'"),
        (lambda: landscape.plane_through(jnp.zeros(2), jnp.ones(2), 2 * jnp.ones(2)), "one line"),
        (lambda: landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), positions=[]), "positions"),
        (lambda: landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), ()), "batches is empty"),
        (lambda: landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), chunk=0), "chunk=0"),
        (
            lambda: landscape.plane(
                jnp.sum, landscape.Plane(jnp.ones(2), (jnp.ones(2), jnp.ones(2))), xs=[], ys=[0.0]
            ),
            "xs has shape",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Plots


def _saved(axes, path):
    axes.figure.savefig(path)
    return matplotlib.image.imread(path)


def test_plots_draw(tmp_path):
    loss, _, params = problem.quadratic(np.arange(1.0, 10))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    result = measures.spectral_density(loss, params)
    xs, ys = np.linspace(-1, 1, 5), np.linspace(-1, 1, 4)
    losses = xs[None] ** 2 + ys[:, None] ** 2
    losses[0, 0] = np.nan
    drawn = {
        "density": plots.density({"one": result, "two": result}),
        "alone": plots.density(result),
        "spectrum": plots.spectrum({"one": result, "two": result}, num_params=9),
        "shares": plots.spectrum(result),
        "contours": plots.contours(
            xs, ys, losses, trajectory=np.array([[0, 0], [0.5, 0.5]]), points={"end": (0.5, 0.5)}
        ),
        "profile": plots.profile({"a": ([0, 1], [1.0, 2.0]), "b": ([0, 1], [2.0, 1.0])}),
        "barrier": plots.profile(measures.linear_barrier(loss, params, params)),
        "scatter": plots.scatter({"sgd": [1.0, 2.0]}, {"sgd": [0.9, 0.8]}),
    }
    for name, axes in drawn.items():
        assert _saved(axes, tmp_path / f"{name}.png").std() > 0.01
    legend = [text.get_text() for text in drawn["density"].get_legend().get_texts()]
    assert legend == ["one", "two"]
    assert drawn["alone"].get_legend() is None
    assert drawn["contours"].texts[0].get_text() == "end"
    line = drawn["profile"].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [1.0, 2.0])


def test_plots_of_nothing_finite(tmp_path):
    axes = plots.contours([0, 1], [0, 1], np.full((2, 2), np.nan))
    assert _saved(axes, tmp_path / "nan.png").size
    axes = plots.scatter({"sgd": [np.nan, -1.0]}, {"sgd": [0.9, 0.8]})
    assert len(axes.lines[0].get_xdata()) == 0


def test_scatter_needs_as_many_of_both():
    with pytest.raises(ValueError, match="as many accuracies"):
        plots.scatter({"sgd": [1.0, 2.0]}, {"sgd": [0.9]})


def test_spectrum_counts_eigenvalues():
    loss, _, params = problem.quadratic(np.arange(1.0, 10))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    result = measures.spectral_density(loss, params, num_probes=number)  # Exact.
    line = plots.spectrum(result, num_params=number).lines[0]
    for size in (0.5, 3.5, 8.5):
        counted = np.interp(size, line.get_xdata(), line.get_ydata())
        np.testing.assert_allclose(counted, sum(np.arange(1.0, 10) > size), rtol=0.02)


def test_scatter_keeps_an_outlier_at_the_edge():
    axes = plots.scatter({"sgd": [1.0, 2.0, 3.0]}, {"sgd": [95.0, 96.0, 40.0]}, lowest=94.0)
    low, high = axes.get_ylim()
    assert low == 94.0
    assert high > 96.0
    assert [text.get_text() for text in axes.texts] == ["40"]


@pytest.mark.parametrize(
    ("limits", "ticks"), [((1, 4), {2.0, 3.0}), ((1, 50), {2.0, 5.0, 20.0}), ((1, 1e4), {10.0})]
)
def test_a_short_logarithmic_axis_has_more_ticks_than_powers_of_ten(limits, ticks):
    axes = plots.profile(([1.0, 2.0], [1.0, 2.0]), log=True)
    axes.set_ylim(*limits)
    plots.tick_powers(axes.yaxis)
    assert ticks <= {round(float(tick), 6) for tick in axes.yaxis.get_majorticklocs()}
    assert (3.0 in axes.yaxis.get_majorticklocs()) == (limits[1] == 4)
