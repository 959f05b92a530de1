"""Momentum-SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import (
    ATOL,
    Array,
    Golden,
    adamw_decaying_after,
    assert_agrees,
    compiled,
    problem,
    replay,
    replays,
    table,
)


def _msam_by_hand(golden: Golden, rho: Array, *, remember_offset: bool) -> dict[str, Array]:
    """Momentum-SAM in plain numpy; `remember_offset=False` copies the slip of the official code."""
    hyper = golden.hyper
    loss_fn, batch = problem(golden)
    value_and_grad = compiled(jax.value_and_grad(loss_fn))
    rate = golden.learning_rate
    w = golden.tree("p0")
    momentum = {name: np.zeros_like(x) for name, x in w.items()}
    inverse_norm, last_rho = 0.0, 0.0
    records = {f"{field}/{name}": [x] for field in ("traj", "eval") for name, x in w.items()}
    records |= {f"mom/{name}": [] for name in w} | {"loss": []}
    for t in range(golden.steps):
        loss, grads = value_and_grad({k: jnp.asarray(x) for k, x in w.items()}, *batch(t, 0))
        records["loss"].append(np.asarray(loss))
        lr = float(rate(t)) if callable(rate) else rate
        back = (last_rho if remember_offset else rho[t]) * inverse_norm
        centre = {k: x + back * momentum[k] for k, x in w.items()}
        for k, g in grads.items():
            decayed = np.asarray(g) + hyper["weight_decay"] * w[k]
            momentum[k] = hyper["momentum"] * momentum[k] + decayed
        centre = {k: c - lr * momentum[k] for k, c in centre.items()}
        norm = np.sqrt(sum(np.sum(v**2) for v in momentum.values()))
        inverse_norm, last_rho = 1 / (norm + 1e-12), rho[t]
        w = {k: c - last_rho * inverse_norm * momentum[k] for k, c in centre.items()}
        for k in w:
            records[f"traj/{k}"].append(w[k])
            records[f"eval/{k}"].append(centre[k])
            records[f"mom/{k}"].append(momentum[k])
    return {key: np.stack(values) for key, values in records.items()}


def _rho_per_step(golden: Golden) -> Array:
    """The radius of each step, as an array."""
    rho = golden.hyper.get("rho_schedule") or [golden.hyper["rho"]] * golden.steps
    return np.asarray(rho[: golden.steps], dtype=float)


@replays("msam")
def test_replays(golden: Golden) -> None:
    """Decay stands before `msam`: the official code decays at the displaced point.

    The official code removes the old offset with the NEW radius, so that a schedule of the radius
    moves its centre; flatopt remembers the offset. Then flatopt is held against the corrected
    recursion, written by hand, and the same recursion with the official slip against the file.
    """
    hyper, rho = golden.hyper, _rho_per_step(golden)
    # The official code accepts `nesterov` and ignores it.
    base = optax.sgd(golden.learning_rate, momentum=hyper["momentum"])
    tx = optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"]),
        flatopt.msam(base, table(rho) if np.ptp(rho) else float(rho[0])),
    )
    replayed = replay(golden, tx, buffers={"mom": lambda s: optax.tree.get(s, "trace")})
    if not np.ptp(rho):
        assert_agrees(golden.results, replayed)
        return
    official = _msam_by_hand(golden, rho, remember_offset=False)
    assert_agrees(golden.results, official, ignore=["grad0"])
    corrected = _msam_by_hand(golden, rho, remember_offset=True)
    assert_agrees(golden.results | corrected, replayed)
    drift = [np.abs(corrected[k] - official[k]).max() for k in official if k.startswith("eval/")]
    assert max(drift) > 1e5 * ATOL


@replays("adamw_msam")
def test_replays_adamw_msam(golden: Golden) -> None:
    """The official AdamW variant remembers its offset, radius included, and decays the centre."""
    rho = _rho_per_step(golden)
    tx = flatopt.msam(adamw_decaying_after(golden), table(rho) if np.ptp(rho) else float(rho[0]))
    buffers = {
        "exp_avg": lambda s: optax.tree.get(s, "mu"),
        "exp_avg_sq": lambda s: optax.tree.get(s, "nu"),
    }
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_msam_sgd_is_msam_on_sgd(decay: float):
    txs = flatopt.msam_sgd(0.05, 0.2, momentum=decay), flatopt.msam(optax.sgd(0.05, decay), 0.2)
    states = [cases.run(tx, steps=20) for tx in txs]
    cases.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_msam_momentum_out_of_range(decay: float):
    with pytest.raises(ValueError, match="momentum="):
        flatopt.msam_sgd(0.1, 0.2, momentum=decay)


def test_no_schedule_of_the_momentum():
    with pytest.raises(TypeError, match=r"momentum=.* A schedule is not taken here"):
        flatopt.msam_sgd(0.1, 0.2, momentum=optax.constant_schedule(0.9))


def test_the_optimiser_is_a_transformation():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        flatopt.msam(0.1, 0.2)
