"""SWAG: the recorded runs, numpy's moments, and samples of the stated covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.swag import displace
from tests import cases
from tests.averaging.feed import WEIGHTS, feed, first_recorded
from tests.replay import Golden, Params, assert_agrees, replay, replays, torch_optimizer


@replays("swag")
def test_replays(golden: Golden) -> None:
    """Means, second moments, deviations, and the sample that the recorded draws make."""
    hyper, rank = golden.hyper, golden.hyper["K"]
    stage = flatopt.swag(rank, start=first_recorded(golden, "collect_at_step"), every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), stage)
    fields = ("mean", "variance", "deviations")
    buffers = {f"kept_{f}": lambda s, f=f: getattr(s[-1], f) for f in fields}
    replayed = replay(golden, tx, buffers=buffers)
    steps = golden.arrays["collect_at_step"]
    kept = {f: {k: replayed[f"kept_{f}/{k}"] for k in golden.tree("p0")} for f in fields}
    number = jnp.asarray(len(steps))
    for name, stack in kept["deviations"].items():  # Oldest first, as the recorded draws are.
        turn = -(len(steps) % rank) if len(steps) > rank else 0
        kept["deviations"][name] = np.roll(stack, turn, axis=1)
    state = flatopt.SwagState(
        jnp.asarray(golden.steps), number, *({k: x[-1] for k, x in kept[f].items()} for f in fields)
    )
    noise, columns = _unflatten(golden), min(len(steps), rank)
    # The official divisor is that of a full set of columns, also before there are so many.
    low_rank = np.zeros(rank)
    low_rank[:columns] = golden.arrays["z_lowrank"] * np.sqrt(max(columns - 1, 1) / (rank - 1))
    # The factor 1/2 of the paper's covariance is part of `scale` there.
    sample = displace(state, noise, jnp.asarray(low_rank), 2 * hyper["scale"])
    results = {k: v for k, v in golden.results.items() if k.split("/")[0] not in _SWAG_INPUTS}
    for name, trajectory in golden.tree("traj").items():
        mean = kept["mean"][name]
        replayed[f"mean/{name}"] = mean[steps - 1]
        replayed[f"sq_mean/{name}"] = (kept["variance"][name] + mean**2)[steps - 1]
        stack = kept["deviations"][name][-1, :columns]
        replayed[f"cov_mat_sqrt/{name}"] = stack.reshape(columns, -1)
        replayed[f"sample/{name}"] = np.asarray(sample[name])
        held = np.searchsorted(steps, np.arange(golden.steps + 1), "right")
        shape = (-1, *[1] * (trajectory.ndim - 1))
        recorded = golden.arrays[f"mean/{name}"][np.maximum(held - 1, 0)]
        results[f"eval/{name}"] = np.where((held > 0).reshape(shape), recorded, trajectory)
    assert_agrees(results, replayed)


_SWAG_INPUTS = ("collect_at_step", "param_order", "z_diag", "z_lowrank")


def _unflatten(golden: Golden) -> Params:
    """The recorded draws for the diagonal part, tensor by tensor."""
    shapes = {
        str(name): golden.tree("p0")[str(name)].shape for name in golden.arrays["param_order"]
    }
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    parts = np.split(golden.arrays["z_diag"], ends[:-1])
    return {
        name: jnp.asarray(part.reshape(shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def test_swag_has_numpys_mean_variance_and_deviations():
    state = feed(flatopt.swag(rank=3))
    np.testing.assert_allclose(state.mean, WEIGHTS.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.variance, WEIGHTS.var(), rtol=1e-5)
    deviations = [WEIGHTS[i] - WEIGHTS[: i + 1].mean() for i in range(7)]
    covariance = flatopt.swag_covariance(state)
    np.testing.assert_allclose(covariance.diagonal, WEIGHTS.var() / 2, rtol=1e-5)
    low_rank = np.sum(np.square(deviations[-3:])) / (2 * 2)
    np.testing.assert_allclose(covariance.marginal, WEIGHTS.var() / 2 + low_rank, rtol=1e-5)


def test_swag_variance_survives_float32():
    """The mean of squares less the square of the mean would be noise here."""
    weights = 100 + 1e-3 * WEIGHTS
    expected = np.float32(weights).astype(np.float64).var()
    np.testing.assert_allclose(feed(flatopt.swag(rank=2), weights).variance, expected, rtol=2e-2)
    naive = np.mean(np.float32(weights) ** 2) - np.mean(np.float32(weights)) ** 2
    assert abs(naive - expected) > 10 * expected


def test_swag_samples_have_the_covariance_that_is_stated():
    params = cases.init_params()["hidden"]
    stage = flatopt.swag(rank=3)
    state = stage.init(params)
    keys = jax.random.split(jax.random.key(1), 6)
    for key in keys:
        noise = jax.tree.map(lambda p, key=key: 0.1 * jax.random.normal(key, p.shape), params)
        _, state = stage.update(noise, state, params)
    draws = 40_000
    keys = jax.random.split(jax.random.key(2), draws)
    samples = jax.vmap(lambda key: flatopt.sample_params((state,), key, params=params))(keys)
    flat = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(samples)
    covariance = flatopt.swag_covariance((state,))
    factors = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(covariance.factors)
    dense = np.diag(jax.flatten_util.ravel_pytree(covariance.diagonal)[0]) + factors.T @ factors
    np.testing.assert_allclose(
        np.diag(dense), jax.flatten_util.ravel_pytree(covariance.marginal)[0], rtol=1e-5
    )
    # The standard error of a covariance is sqrt((S_ii S_jj + S_ij^2) / draws).
    scale = np.sqrt((np.outer(np.diag(dense), np.diag(dense)) + dense**2) / draws)
    assert np.abs((np.cov(flat.T) - dense) / scale).max() < 5
    assert np.abs(dense - np.diag(np.diag(dense))).max() > 20 * scale.max()
    mean = jax.flatten_util.ravel_pytree(state.mean)[0]
    assert np.abs((flat.mean(0) - mean) / np.sqrt(np.diag(dense) / draws)).max() < 5
    cases.assert_close(flatopt.sample_params(state, keys[0], params=params, scale=0.0), state.mean)


def test_samples_before_the_first_model_and_in_half_precision():
    stage, params = flatopt.swag(rank=2, start=3), jnp.ones(4, jnp.bfloat16)
    state = stage.init(params)
    sample = flatopt.sample_params(state, jax.random.key(0), params=params)
    cases.assert_equal(sample, params)
    for _ in range(5):
        _, state = stage.update(params, state, params)
    assert flatopt.sample_params(state, jax.random.key(0), params=params).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="holds 0 states"):
        flatopt.sample_params((), jax.random.key(0))


def test_a_rank_below_two_is_refused():
    with pytest.raises(ValueError, match="rank=1 is out of range"):
        flatopt.swag(1)
