"""Batch samplers: which samples a step sees is itself a source of noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flatopt._core import checks, rng


class PersistentState(NamedTuple):
    """State of a `PersistentSampler`.

    Attributes:
      active: bool [num_samples], the samples in the present batch.
      key: raw uint32 data of the random key.
    """

    active: jax.Array
    key: jax.Array


class PersistentSampler(NamedTuple):
    r"""The batches of persistent SGD: each sample enters and leaves on its own, and stays a while.

    .. math::
      P(0 \to 1) = \frac{1}{\tau}, \qquad P(1 \to 0) = \frac{1 - b}{b \tau}

    a two-state Markov chain for each sample, independent of the others. In equilibrium a sample is
    active with probability b, stays so for :math:`b \tau / (1 - b)` steps on average, and the
    correlation of its state with that k steps later is :math:`(1 - 1 / (b \tau))^k`.
    With :math:`\tau = 1 / b` each step draws a fresh batch.

    Make one with `persistent_sampler`.

    Attributes:
      num_samples: number of samples. Static.
      fraction: b, the stationary share of active samples.
      persistence: :math:`\tau`, in steps.
    """

    num_samples: int
    fraction: float
    persistence: float

    def init(self, key: rng.KeyLike = 0) -> PersistentState:
        """Draws the first batch from the stationary law; `key` is a key or an integer seed."""
        later, now = rng.split(rng.key_data(key))
        return PersistentState(jax.random.bernoulli(now, self.fraction, (self.num_samples,)), later)

    def next(self, state: PersistentState) -> PersistentState:
        """Moves every sample's chain one step on; pure, works under `jit`, `scan` and `vmap`."""
        later, now = rng.split(state.key)
        leave = (1 - self.fraction) / (self.fraction * self.persistence)
        draws = jax.random.uniform(now, (self.num_samples,))
        # One draw for both: those below `leave` leave, those below 1 / tau enter.
        active = jnp.where(state.active, draws >= leave, draws < 1 / self.persistence)
        return PersistentState(active, later)

    def weights(self, state: PersistentState, *, normalise: bool = False) -> jax.Array:
        """Weights of the samples in a sum of losses that estimates their mean.

        Args:
          state: the present batch.
          normalise: divide by the number of active samples, so that the weights sum to 1; else by
            its mean, b N, which keeps the estimate unbiased.

        Returns:
          float32 [num_samples], zero for inactive samples. All are zero in an empty batch.
        """
        active = state.active.astype(jnp.float32)
        if normalise:
            return active / jnp.maximum(jnp.sum(active), 1)
        return active / (self.fraction * self.num_samples)


def persistent_sampler(num_samples: int, fraction: float, persistence: float) -> PersistentSampler:
    r"""Makes the sampler of persistent SGD.

    .. math:: g = \sum_{i \text{ active}} \nabla \ell_i / (b N)

    Args:
      num_samples: N >= 1. Static.
      fraction: b in (0, 1], the mean share of the samples in a batch.
      persistence: :math:`\tau`, the mean number of steps that an inactive sample waits, at least 1
        and (1 - b) / b. 1 / b gives independent batches; larger, a batch lasts longer.

    Returns:
      A `PersistentSampler`, to go with any optimiser.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> sampler = flatopt.samplers.persistent_sampler(100_000, fraction=0.25, persistence=20.0)
      >>> state = sampler.init(0)
      >>> print(f"{jnp.mean(sampler.next(state).active != state.active):.3f}")
      0.075

    References:
      Mignacco, Krzakala, Urbani, Zdeborova. Dynamical mean-field theory for stochastic gradient
      descent in Gaussian mixture classification. arXiv:2006.06098

    Cost: 0 extra gradients; a flag a sample in its state.
    """
    checks.check_count("num_samples", num_samples, 1)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is out of range: it must be in (0, 1].")
    shortest = max(1.0, (1 - fraction) / fraction)
    if not shortest <= persistence < float("inf"):
        raise ValueError(
            f"persistence={persistence} is out of range: with fraction={fraction} it must be a "
            f"finite number of at least {shortest:g} steps, or probabilities would exceed 1."
        )
    return PersistentSampler(num_samples, fraction, persistence)
