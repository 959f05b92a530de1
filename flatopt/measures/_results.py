"""Results that several measures share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Estimate(NamedTuple):
    """A number from random draws.

    Attributes:
      value: the mean.
      standard_error: of the mean, over the draws; NaN for a single draw, 0 where nothing is random.
    """

    value: jax.Array
    standard_error: jax.Array


def estimate(samples: jax.Array) -> Estimate:
    """The mean over the leading axis and its standard error."""
    number = samples.shape[0]
    value = jnp.mean(samples, axis=0)
    if number == 1:
        return Estimate(value, jnp.full_like(value, jnp.nan))
    return Estimate(value, jnp.std(samples, axis=0, ddof=1) / number**0.5)
