"""Merging: weights that stand in for a decay, sums, and the greedy soup."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.averaging.feed import evaluated, feed


@pytest.mark.parametrize("kernel", ["linear", "cosine", "1-sqrt", lambda x: (1 - x) ** 3])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_merged_checkpoints_stand_in_for_a_decaying_rate(kernel: Any, number: int):
    """Fixed gradients: the merged weights are those of a run whose rate decays by the kernel."""
    weights = flatopt.merge_weights(kernel, number)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (weights >= -1e-7).all()
    checkpoints = np.cumsum(np.random.default_rng(1).normal(size=(number, 3)), axis=0)
    named = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
        "1-sqrt": lambda x: 1 - np.sqrt(x),
    }
    decay = named.get(kernel, kernel) if isinstance(kernel, str) else kernel
    decayed = checkpoints[0].copy()
    for i in range(1, number):
        decayed += decay(i / number) * (checkpoints[i] - checkpoints[i - 1])
    stack = jnp.asarray(checkpoints, jnp.float32)
    np.testing.assert_allclose(flatopt.merge_params(stack, weights), decayed, rtol=1e-5, atol=1e-6)


def test_a_linear_kernel_is_the_latest_weight_average():
    stack, number = flatopt.snapshot_params(feed(flatopt.snapshots(3)))
    weights = flatopt.merge_weights("linear", 3)
    merged = flatopt.merge_params(stack, weights)
    np.testing.assert_allclose(merged, evaluated(flatopt.lawa(3)), rtol=1e-6)
    np.testing.assert_allclose(flatopt.merge_params(stack), merged, rtol=1e-6)
    assert number == 3


def test_merging_keeps_dtypes_copies_integers_and_is_summed_in_float32():
    stack = {"half": jnp.full([300, 2], 1.0, jnp.bfloat16), "steps": jnp.arange(300)}
    merged = flatopt.merge_params(stack, jnp.full(300, 1 / 300))
    assert merged["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged["half"], np.float32), 1.0)
    assert merged["steps"] == 299
    with pytest.raises(ValueError, match=r"weights has shape \(2,\): it must be \(300,\)"):
        flatopt.merge_params(stack, jnp.ones(2))
    with pytest.raises(ValueError, match="kernel='sqrt' is unknown"):
        flatopt.merge_weights("sqrt", 3)


def test_merging_weights_can_be_trained():
    stack = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])}
    target = jnp.array([0.25, 0.75])

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.sum((flatopt.merge_params(stack, jax.nn.softmax(logits))["w"] - target) ** 2)

    logits, tx = jnp.zeros(3), optax.adam(0.1)
    state, gradient = tx.init(logits), jax.jit(jax.grad(loss))
    for _ in range(500):
        updates, state = tx.update(gradient(logits), state)
        logits = optax.apply_updates(logits, updates)
    np.testing.assert_allclose(jax.nn.softmax(logits), [0.25, 0.75, 0.0], atol=2e-2)


def test_greedy_soup_takes_what_helps_and_nothing_else():
    stack, calls = {"w": jnp.array([4.0, 1.5, jnp.nan, -3.0, 1.0])}, []

    def score(params: Any) -> float:
        calls.append(params)
        return -abs(float(params["w"]) - 1.2)

    soup, chosen = flatopt.greedy_soup(stack, score)
    # 1.0 is best (0.2 away); with 1.5 the mean is 1.25; 4.0 and -3.0 would spoil it.
    assert chosen == [4, 1]
    np.testing.assert_allclose(soup["w"], 1.25)
    assert len(calls) == 2 * 5 - 1
    alone, chosen = flatopt.greedy_soup({"w": jnp.array([2.0])}, score)
    assert (alone["w"], chosen) == (2.0, [0])
    with pytest.raises(ValueError, match="stack is empty"):
        flatopt.greedy_soup({}, score)
