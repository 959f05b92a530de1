"""Curvature in Kronecker factors, against the dense Gauss-Newton matrix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import flatopt
from flatopt import measures
from tests import cases

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
LAYERS = ("first", "second")


def _tree(*sizes: int):
    """Layers whose leaves lie in the order of their factors: kernel, then bias."""
    rng = np.random.default_rng(1)

    def layer(m: int, n: int):
        normal = [rng.normal(size=(m, n)), rng.normal(size=n)]
        return dict(zip(("w", "b"), (jnp.asarray(v, jnp.float32) for v in normal), strict=True))

    pairs = itertools.pairwise(sizes)
    return {name: layer(m, n) for name, (m, n) in zip(LAYERS, pairs, strict=False)}


def _network(activation):
    def model(params, x):
        for name in params:
            if name != LAYERS[0]:
                x = activation(x)
            x = flatopt.tap(name, x, x @ params[name]["w"] + params[name]["b"][None])
        return x

    return model


def _ravel(layer) -> jax.Array:
    """Entries of a layer in the order of the Kronecker product."""
    return jnp.concatenate([layer["w"], layer["b"][None]]).ravel()


def _block(model, params, name: str, x, loss: str) -> np.ndarray:
    """The Gauss-Newton matrix of one layer, by its Jacobian."""
    flat = _ravel(params[name])
    shape = params[name]["w"].shape

    def outputs(flat):
        matrix = flat.reshape(shape[0] + 1, shape[1])
        return model({**params, name: {"w": matrix[:-1], "b": matrix[-1]}}, x)

    jacobian, p = jax.jacobian(outputs)(flat), jax.nn.softmax(outputs(flat))
    inner = jnp.broadcast_to(jnp.eye(p.shape[1]), (*p.shape, p.shape[1]))
    if loss == "softmax":
        inner = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return np.asarray(jnp.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian)) / len(x)


def _dense(curvature, params, name: str) -> np.ndarray:
    """The block of one layer, column by column."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, params))
    columns = jax.vmap(lambda e: _ravel(curvature.matvec(unravel(e))[name]))(jnp.eye(len(flat)))
    order = jax.vmap(lambda e: _ravel(unravel(e)[name]))(jnp.eye(len(flat)))
    return np.asarray(order.T @ columns)


# Where inputs and gradients at outputs are independent, the factors are all there is to know.
EXACT = {
    "one layer, squared loss": (jnp.tanh, (3, 2), X, "squared"),
    "one example": (jnp.tanh, (3, 4, 2), X[:1], "softmax"),
    "a deep linear network, squared loss": (lambda x: x, (3, 4, 2), X, "squared"),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("scales", ["product", "measured"])
def test_where_kfac_is_exact_it_is_the_gauss_newton_matrix(case: str, scales: str):
    activation, sizes, x, loss = EXACT[case]
    model, params = _network(activation), _tree(*sizes)
    stats_fn = flatopt.make_stats_fn(model, x, loss=loss)
    found = measures.kfac_curvature(stats_fn, params, damping=0.1, scales=scales)
    blocks = [_block(model, params, name, x, loss) for name in params]
    blocks = [block + 0.1 * np.eye(len(block)) for block in blocks]
    vector = _tree(*sizes)
    products, solutions = found.matvec(vector), found.solve(vector)
    for name, block in zip(params, blocks, strict=True):
        expected = block @ _ravel(vector[name])
        np.testing.assert_allclose(_ravel(products[name]), expected, rtol=1e-4, atol=1e-4)
        expected = np.linalg.solve(block, _ravel(vector[name]))
        np.testing.assert_allclose(_ravel(solutions[name]), expected, rtol=1e-3, atol=1e-3)
    values = np.sort(np.concatenate([np.linalg.eigvalsh(block) for block in blocks]))[::-1]
    np.testing.assert_allclose(found.eigenvalues(), values, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.trace(), values.sum(), rtol=1e-4)
    np.testing.assert_allclose(found.logdet(), np.log(values).sum(), rtol=1e-3)


def test_elsewhere_each_layer_is_a_product_of_two_matrices():
    model, params = _network(jnp.tanh), _tree(3, 4, 2)
    stats_fn = flatopt.make_stats_fn(model, X)
    found, seen = measures.kfac_curvature(stats_fn, params), stats_fn(params)
    for name, (a, g, _) in seen.items():
        np.testing.assert_allclose(_dense(found, params, name), jnp.kron(a, g), atol=1e-4)
        # Layers do not mix.
        alone = jax.tree.map(jnp.zeros_like, params) | {name: params[name]}
        other = next(own for own in params if own != name)
        assert all(not jnp.any(leaf) for leaf in found.matvec(alone)[other].values())
    blocks = [_block(model, params, name, X, "softmax") for name in params]
    assert not np.allclose(_dense(found, params, "first"), blocks[0], rtol=0.05, atol=1e-3)


def test_measured_scales_have_the_trace_of_the_gauss_newton_matrix():
    """The diagonal in any basis sums to the trace; a product of means does not."""
    model, params = _network(jnp.tanh), _tree(3, 4, 2)
    stats_fn = flatopt.make_stats_fn(model, X)
    exact = sum(np.trace(_block(model, params, name, X, "softmax")) for name in params)
    product, measured = (
        measures.kfac_curvature(stats_fn, params, scales=scales).trace()
        for scales in ("product", "measured")
    )
    np.testing.assert_allclose(measured, exact, rtol=1e-4)
    assert abs(product / exact - 1) > 1e-3


def test_its_spectrum_is_that_of_the_gauss_newton_matrix_where_it_is_exact():
    model, params = _network(jnp.tanh), _tree(3, 2)
    found = measures.kfac_curvature(flatopt.make_stats_fn(model, X, loss="squared"), params)
    density = measures.spectral_density(
        model, params, X[None], num_probes=8, num_steps=8, output_loss="squared_error"
    )
    mean = jnp.sum(density.nodes * density.weights) / jnp.sum(density.weights)
    np.testing.assert_allclose(found.eigenvalues()[0], jnp.max(density.nodes), rtol=1e-3)
    np.testing.assert_allclose(jnp.mean(found.eigenvalues()), mean, rtol=1e-3)


def test_batches_are_averaged_and_the_object_crosses_jit():
    model, params = _network(jnp.tanh), _tree(3, 4, 2)
    whole = measures.kfac_curvature(flatopt.make_stats_fn(model, X[:4]), params)

    @jax.jit
    def of_two(params, x):
        stats_fns = [flatopt.make_stats_fn(model, part) for part in (x[:2], x[2:])]
        return measures.kfac_curvature(stats_fns, params, damping=0.5)

    two = of_two(params, X[:4])._replace(damping=0.0)
    cases.assert_close(two.matvec(params), whole.matvec(params), rtol=1e-3, atol=1e-3)


def test_draws_have_the_inverse_as_their_covariance():
    model, params = _network(jnp.tanh), _tree(3, 2) | {"scale": jnp.ones(2)}

    def only_first(params, x):
        return model({"first": params["first"]}, x)

    found = measures.kfac_curvature(flatopt.make_stats_fn(only_first, X), params, damping=0.5)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: found.sample(key, params, examples=4))(keys)
    assert (drawn["scale"] == 1).all()
    around = jax.vmap(_ravel)(drawn["first"]) - _ravel(params["first"])[None]
    inverse = np.linalg.inv(_dense(found, params, "first")) / 4
    np.testing.assert_allclose(around.T @ around / 4000, inverse, atol=0.05)


def test_results_are_float32_and_zero_outside_the_layers():
    params = {"first": {"kernel": jnp.ones([3, 2], jnp.bfloat16)}, "scale": jnp.ones(2)}

    def model(params, x):
        return flatopt.tap("first", x, x @ params["first"]["kernel"])

    found = measures.kfac_curvature(flatopt.make_stats_fn(model, X), params, damping=0.5)
    product = found.matvec(params)
    assert product["first"]["kernel"].dtype == jnp.float32
    assert not jnp.any(product["scale"])


def test_errors_name_the_mend():
    params = _tree(3, 2)
    stats_fn = flatopt.make_stats_fn(_network(jnp.tanh), X)
    with pytest.raises(ValueError, match="scales='exact'"):
        measures.kfac_curvature(stats_fn, params, scales="exact")
    with pytest.raises(ValueError, match=r"\[flatopt.make_stats_fn\(model, x\) for x in batches\]"):
        measures.kfac_curvature([], params)
    with pytest.raises(ValueError, match="no layer 'first' of 4 rows"):
        measures.kfac_curvature(stats_fn, params).matvec(_tree(4, 2))
