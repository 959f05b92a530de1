"""Random weight perturbation."""

import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import Golden, assert_agrees, recorded_noise, replay, replays, torch_optimizer


def test_without_weight_it_is_the_clean_gradient():
    stage, w = flatopt.rwp(0.1, alpha=0.0), jnp.array([1.0, -2.0])
    updates, _ = stage.update(w, stage.init(w), w, grad_fn=lambda w, i: w)
    np.testing.assert_array_equal(updates, w)


def test_the_noise_is_in_proportion_to_each_filter():
    perturbation = flatopt.filter_noise(0.1, key=0)
    kernel = jnp.ones((500, 2)) * jnp.array([[1.0, 3.0]])
    noise, _ = perturbation.update(kernel, perturbation.init(kernel), kernel)
    norms = jnp.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(jnp.std(noise, axis=0), 0.1 * norms, rtol=0.1)


@replays("rwp")
def test_replays(golden: Golden) -> None:
    """The displaced gradient is taken on the second batch of a step, if there are two."""
    hyper = golden.hyper
    stage = flatopt.rwp(
        hyper["gamma"], alpha=hyper["alpha"], filter_axis=0, noise=recorded_noise(golden)
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx, extra_batch=lambda t, i: (t, 1)))
