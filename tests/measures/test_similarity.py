"""How alike two networks are, by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatopt import measures
from tests.measures import problem
from tests.replay import Golden, replays


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_cka_is_the_unbiased_estimate_by_hand():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()

    def hsic(k, m):  # As in its definition, with the diagonals removed.
        n = len(k)
        k, m = (x - np.diag(np.diag(x)) for x in (k, m))
        one = np.ones(n)
        both = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (both - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    sums = np.zeros(3)
    for i in range(problem.N):
        batch = jax.tree.map(lambda x, i=i: x[i], data)
        k, m = (np.asarray(f @ f.T) for f in (problem.model_fn(p, batch) for p in (first, second)))
        sums += [hsic(k, m), hsic(k, k), hsic(m, m)]
    value = measures.cka(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, sums[0] / np.sqrt(sums[1] * sums[2]), rtol=1e-9)
    np.testing.assert_allclose(measures.cka(problem.model_fn, first, first, data), 1, rtol=1e-9)


def test_cka_of_unrelated_features_is_about_zero_for_small_batches():
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(400, 6, 20)))

    halves = {"w": jnp.zeros(1)}
    value = measures.cka(
        lambda p, x: x[:, :10] + p["w"][None],
        halves,
        halves,
        data,
        other_features_fn=lambda p, x: x[:, 10:] + p["w"][None],
    )
    assert abs(value) < 0.05


def test_prediction_disagreement():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    whole = problem.flat_data(data)
    votes = [jnp.argmax(problem.model_fn(p, whole), axis=1) for p in (first, second)]
    value = measures.prediction_disagreement(problem.model_fn, first, second, data)
    np.testing.assert_allclose(value, np.mean(votes[0] != votes[1]))
    assert measures.prediction_disagreement(problem.model_fn, first, first, data) == 0
    broken = jax.tree.map(lambda x: x * jnp.nan, first)
    assert np.isnan(measures.prediction_disagreement(problem.model_fn, first, broken, data))


def _rbf_features(x):
    """Features whose scalar products are the official Gaussian kernel, of half the median width."""
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=-1)
    values, vectors = np.linalg.eigh(np.exp(-squares / (2 * 0.5**2 * np.median(squares))))
    return vectors * np.sqrt(np.maximum(values, 0))


@replays("cka")
def test_replays(golden: Golden):
    for number in range(len(json.loads(str(golden.arrays["meta"]))["cases"])):
        case = golden.tree(f"case{number}")
        for kernel, lift in (("linear", np.asarray), ("rbf", _rbf_features)):
            features = tuple(jnp.asarray(lift(case[name])) for name in "xy")
            for theirs, ours in (("biased", "biased"), ("debiased", "unbiased")):
                value = measures.cka(
                    lambda i, batch: batch[0], 0.0, 0.0, [features], estimator=ours,
                    other_features_fn=lambda i, batch: batch[1],
                )  # fmt: skip
                np.testing.assert_allclose(value, case[f"cka_{kernel}_{theirs}"], rtol=1e-9)
        np.testing.assert_allclose(case["feature_space_linear_cka"], case["cka_linear_biased"])

        logits = [jnp.asarray(case[f"logits{i}"]) for i in (1, 2)]
        agreement, divergence = case["agreement_js_cosine"][:2]
        networks = (lambda w, b: w, *logits, [jnp.zeros(1)])
        np.testing.assert_allclose(1 - measures.prediction_disagreement(*networks), agreement)
        probabilities = [np.asarray(jax.nn.softmax(x)) for x in logits]
        # The official mixture is never below 1e-7; ours, by hand, is not clamped.
        for clamp, value in ((1e-7, divergence), (0.0, measures.jensen_shannon(*networks))):
            mixture = np.maximum(sum(probabilities) / 2, clamp)
            parts = [np.sum(p * np.log(p / mixture)) / len(p) for p in probabilities]
            np.testing.assert_allclose(value, sum(parts) / 2, rtol=1e-9)


def test_the_biased_estimate_rises_as_batches_shrink():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(240, 20)))

    def cka(batch_size, estimator):
        return measures.cka(
            lambda w, x: x[:, :10], 0.0, 0.0, x.reshape(-1, batch_size, 20),
            other_features_fn=lambda w, x: x[:, 10:], estimator=estimator,
        )  # fmt: skip

    assert cka(6, "biased") > cka(60, "biased") > cka(240, "biased") > 0
    assert cka(6, "biased") > 0.5 > 0.1 > abs(cka(6, "unbiased"))
    x = x[:2]
    np.testing.assert_allclose(cka(2, "biased"), 1)  # Two examples have one distance.
    with pytest.raises(ValueError, match="at least 4"):
        cka(2, "unbiased")
    with pytest.raises(ValueError, match="estimator='other'"):
        cka(2, "other")


def test_jensen_shannon_at_its_ends():
    first, second = problem.params(0), problem.params(1)
    data = problem.batches()
    value = measures.jensen_shannon(problem.model_fn, first, second, data)
    np.testing.assert_allclose(
        value, measures.jensen_shannon(problem.model_fn, second, first, data), rtol=1e-12
    )
    assert 0 < value < np.log(2)
    np.testing.assert_allclose(
        measures.jensen_shannon(problem.model_fn, first, first, data), 0, atol=1e-12
    )
    sure = 1e4 * jnp.eye(3)
    opposed = measures.jensen_shannon(
        lambda w, b: w, sure, jnp.roll(sure, 1, axis=0), [jnp.zeros(1)]
    )
    np.testing.assert_allclose(opposed, np.log(2))
    broken = jax.tree.map(lambda x: x * jnp.nan, first)
    assert np.isnan(measures.jensen_shannon(problem.model_fn, first, broken, data))
