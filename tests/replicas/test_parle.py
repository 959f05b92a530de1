"""Parle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import Golden, assert_agrees, replay_replicas, replays


def test_parle_with_one_update_a_round_by_hand():
    """N = 2, L = 1, against the recursion in numpy."""
    lr, gamma, rho, beta, past = 0.1, 0.3, 0.7, 0.9, 0.75
    tx = flatopt.parle(lr, gamma, rho, every=1, momentum=beta, averaging=past)
    start = np.array([[1.0, -2.0], [3.0, 0.5]])
    y, x, z = start.copy(), start.copy(), start.copy()
    v, big = np.zeros_like(y), np.zeros_like(y)
    with jax.enable_x64(True):
        params = jnp.asarray(start)
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
            d = y + gamma * (y - x)
            v = beta * v + d
            y = y - lr * (d + v)
            z = past * z + (1 - past) * y
            pull = (x - z) + rho * (x - z.mean(0))
            big = beta * big + pull
            y = y - lr * (pull + big)
            x = y.copy()
        np.testing.assert_allclose(params, y, rtol=1e-10)


@replays("parle")
def test_replays(golden: Golden) -> None:
    """The official counter advances by the number of tensors in each inner step: kept in here.

    Its period is that of the scoping, so gamma and rho grow so many times faster than the paper
    says; to flatopt they are schedules, and which one is the caller's affair.
    """
    hyper = golden.hyper
    number, length, tensors = int(hyper["n"]), int(hyper["L"]), len(golden.params)
    growth = 1 + 0.5 / hyper["nb"]

    def scoped(init_value: float, most: float, ahead: int) -> optax.Schedule:
        return lambda t: jnp.minimum(
            init_value * growth ** ((tensors * (t + ahead)) // length), most
        )

    gamma = scoped(hyper["gamma"], 1.0, ahead=0)
    # After the inner steps, at a synchronisation, the counter has gone on.
    rho = scoped(hyper["rho"] * length * number, 10.0, ahead=1)
    tx = flatopt.parle(golden.learning_rate, gamma, rho, every=length)
    replayed = replay_replicas(golden, tx, updates_per_step=length)
    replayed["gamma_t"] = np.asarray([gamma(t) for t in range(golden.steps * length)])
    assert_agrees(golden.results, replayed)
