"""What is exact of the claims: the saddle's threshold, the limit cycle, Lookahead's variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from benchmarks import record
from benchmarks.claims import saddle_cells, saddles, store

BEALE = jnp.array(saddles.BEALE_SADDLE)


def test_the_saddle_of_beale():
    np.testing.assert_allclose(jax.grad(saddles.beale)(BEALE), 0.0, atol=1e-5)
    eigenvalues = np.linalg.eigvalsh(jax.hessian(saddles.beale)(BEALE))
    np.testing.assert_allclose(eigenvalues, [-27.75, 27.75], rtol=1e-5)


@pytest.mark.parametrize("lam", [1.0, 2.0, 5.0])
def test_the_threshold(lam: float):
    loss = functools.partial(saddles.quartic, curvature=lam)
    saddle = jnp.zeros(2)
    rho = saddles.threshold(loss, saddle)
    np.testing.assert_allclose(rho, 1 / lam, rtol=1e-6)
    count = functools.partial(saddles.trapped, loss, saddle)
    assert count(0.99 * rho, 0.1 / lam, 20_000) <= 1
    assert count(1.01 * rho, 0.1 / lam, 20_000) >= 61


def test_the_threshold_of_beale():
    rho = saddles.threshold(saddles.beale, BEALE)
    count = functools.partial(saddles.trapped, saddles.beale, BEALE)
    assert count(0.8 * rho, 1e-3, 20_000) <= 1
    assert count(1.05 * rho, 1e-3, 20_000) >= 61


@pytest.mark.parametrize(("eta", "lam", "rho"), [(0.05, 10.0, 0.1), (0.1, 2.0, 0.5)])
def test_the_limit_cycle(eta: float, lam: float, rho: float):
    def end(ascent: optax.GradientTransformationExtraArgs) -> float:
        tx = optax.chain(ascent, optax.sgd(eta))
        return abs(float(saddles.descend(tx, lambda w: lam / 2 * w**2, jnp.float32(1.0), 1000)))

    np.testing.assert_allclose(end(flatopt.sam(rho)), saddles.cycle_radius(eta, lam, rho), 5e-4)
    assert end(flatopt.unified_sam(rho, lam=0.0)) < 1e-6


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 5), (0.8, 10)])
def test_the_variance_of_lookahead(alpha: float, k: int):
    """On the slow weights, against the stationary variance of SGD, at many times of many chains."""
    eta, chains, rounds = 0.1, 4096, 60
    tx = flatopt.lookahead(optax.sgd(eta), every=k, slow_step_size=alpha)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        w = jnp.zeros(chains)

        def one_round(carry, key):
            def step(carry, key):
                w, state = carry
                grads = w - jax.random.normal(key, w.shape)  # Of (w - noise)^2 / 2.
                updates, state = tx.update(grads, state, w)
                return (optax.apply_updates(w, updates), state), None

            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, k))
            return carry, jnp.mean(carry[0] ** 2)

        return jax.lax.scan(one_round, (w, tx.init(w)), jax.random.split(key, rounds))[1]

    stationary = eta**2 / (1 - (1 - eta) ** 2)
    measured = float(jnp.mean(run(jax.random.key(0))[rounds // 2 :])) / stationary
    expected = saddles.lookahead_variance_ratio(eta, alpha, k)
    assert expected < 1
    np.testing.assert_allclose(measured, expected, rtol=0.03)


def test_what_delays_the_escape():
    """A larger radius and a larger batch; momentum hastens it as a sum alone, by a larger step."""

    def median(rho: float, batch_size: float, momentum: float = 0.0, ema: bool = False) -> float:
        rho, batch_size = jnp.float32(rho), jnp.float32(batch_size)
        return float(
            np.median(
                saddles.escape_times(rho, batch_size, momentum, steps=2000, paths=64, ema=ema)
            )
        )

    plain = median(0.0, 1)
    assert plain < median(0.2, 1) < median(0.5, 1) < median(0.5, 64)
    assert median(0.0, 1, 0.9) < 0.5 * plain < plain < median(0.0, 1, 0.9, ema=True)


def test_the_committed_records():
    records = store.read(record.RESULTS / "claims", "saddles")
    assert set(records) == {cell.name for cell in saddle_cells.cells("full")}
    assert saddle_cells.verdict(records).word == "reproduced"
    assert saddle_cells.table(records).count("\n") > len(records)
