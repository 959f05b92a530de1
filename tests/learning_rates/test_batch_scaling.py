"""The learning rate of another batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt


@pytest.mark.parametrize(("rule", "factor"), [("linear", 8.0), ("sqrt", 8.0**0.5)])
def test_a_rate_grows_by_its_rule_and_comes_back(rule: str, factor: float):
    larger = flatopt.batch_scaling(0.01, 32, 256, rule=rule)
    np.testing.assert_allclose(larger, 0.01 * factor)
    np.testing.assert_allclose(flatopt.batch_scaling(larger, 256, 32, rule=rule), 0.01)
    assert flatopt.batch_scaling(0.01, 32, 32, rule=rule) == 0.01


def test_a_schedule_stays_a_schedule_of_the_same_steps():
    schedule = optax.cosine_decay_schedule(0.1, 10)
    scaled = flatopt.batch_scaling(schedule, 32, 128)
    for step in (0, 3, 10):
        np.testing.assert_allclose(scaled(step), 4 * schedule(step), rtol=1e-6)
    rates = jax.vmap(lambda rate: flatopt.batch_scaling(rate, 1, 4, rule="sqrt"))(jnp.arange(3.0))
    np.testing.assert_allclose(rates, [0.0, 2.0, 4.0])


def test_the_noise_of_a_step_stays_as_it_was():
    """Of SGD on a quadratic: the linear rule keeps the variance of the weights it ends with."""
    rng, curvature, samples = np.random.default_rng(0), 1.0, 20_000

    def variance(rate: float, batch: int) -> float:
        w = np.zeros(samples)
        for _ in range(int(8 / rate)):
            w -= rate * (curvature * w + rng.normal(size=samples) / batch**0.5)
        return float(w.var())

    small, rate = variance(0.02, 1), float(flatopt.batch_scaling(0.02, 1, 4))
    # Four times as long a step over a quarter of the variance; up to the steps that are not small.
    np.testing.assert_allclose(variance(rate, 4), small, rtol=0.08)
    assert variance(0.02, 4) < 0.3 * small


def test_wrong_arguments_say_so():
    for arguments, message in [
        ((-0.1, 1, 1), "learning_rate=-0.1 is out of range"),
        ((0.1, 0, 1), "old_batch=0 is out of range"),
        ((0.1, 1, 0), "new_batch=0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            flatopt.batch_scaling(*arguments)
    with pytest.raises(ValueError, match="rule='cube' must be one of linear, sqrt"):
        flatopt.batch_scaling(0.1, 1, 2, rule="cube")
    with pytest.raises(TypeError, match=r"new_batch=1\.5 must be a Python int"):
        flatopt.batch_scaling(0.1, 1, 1.5)  # type: ignore[arg-type]
