"""Power-law averages: the shares of their closed form, also of the millionth model."""

import jax.numpy as jnp
import numpy as np
import pytest

import flatopt
from tests.averaging.feed import WEIGHTS, evaluated, feed


@pytest.mark.parametrize("exponent", [0.0, 1.0, 6.94])
def test_power_ema_has_the_shares_of_its_closed_form(exponent: float):
    n = len(WEIGHTS)
    shares = np.ones(n)
    for i in range(2, n + 1):
        decay = (1 - 1 / i) ** (exponent + 1)
        shares[: i - 1] *= decay
        shares[i - 1] = 1 - decay
    np.testing.assert_allclose(evaluated(flatopt.power_ema(exponent)), shares @ WEIGHTS, rtol=1e-5)
    if exponent == 0:
        np.testing.assert_allclose(shares, 1 / n)
        expected = evaluated(flatopt.swa())
        np.testing.assert_allclose(evaluated(flatopt.power_ema(0.0)), expected, rtol=1e-6)


def test_power_ema_keeps_its_precision_over_many_models():
    state = feed(flatopt.power_ema(6.94), [1.0])
    state = state._replace(total_weight=jnp.float32(1e6), mean=jnp.float32(0.0))
    _, state = flatopt.power_ema(6.94).update(jnp.float32(0), state, jnp.float32(1.0))
    np.testing.assert_allclose(state.mean, 7.94e-6, rtol=1e-4)
