"""Adapters: how each recorded method of the SAM family is built from flatopt."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import (
    ATOL,
    Array,
    Golden,
    assert_agrees,
    compiled,
    decay_after_step,
    problem,
    replay,
    table,
    torch_optimizer,
)


def replay_sam(golden: Golden) -> None:
    hyper = golden.hyper
    rho = hyper["rho"]
    stage = flatopt.asam(rho, eta=0.0) if hyper.get("adaptive") else flatopt.sam(rho)
    base = torch_optimizer(hyper, golden.learning_rate, hyper.get("base", "sgd"))
    assert_sam_agrees(golden, optax.chain(stage, base))


def replay_asam_samsung(golden: Golden) -> None:
    """Only tensors that are called "weight" are measured in units of themselves."""
    hyper = golden.hyper
    if hyper["minimizer"] == "ASAM":
        mask = {name: "weight" in name for name in golden.tree("p0")}
        stage = flatopt.asam(hyper["rho"], eta=hyper["eta"], mask=mask)
    else:
        stage = flatopt.sam(hyper["rho"])
    base = torch_optimizer(hyper, golden.learning_rate)
    assert_sam_agrees(golden, optax.chain(stage, base))


def replay_adamw_sam(golden: Golden) -> None:
    assert_sam_agrees(
        golden, optax.chain(flatopt.sam(golden.hyper["rho"]), _adamw_decaying_after(golden))
    )


def replay_msam(golden: Golden) -> None:
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


def replay_adamw_msam(golden: Golden) -> None:
    """The official AdamW variant remembers its offset, radius included, and decays the centre."""
    rho = _rho_per_step(golden)
    tx = flatopt.msam(_adamw_decaying_after(golden), table(rho) if np.ptp(rho) else float(rho[0]))
    buffers = {
        "exp_avg": lambda s: optax.tree.get(s, "mu"),
        "exp_avg_sq": lambda s: optax.tree.get(s, "nu"),
    }
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))


def assert_sam_agrees(golden: Golden, tx: optax.GradientTransformation) -> None:
    """Compares all; with radius 0 flatopt takes no second gradient, and the file's is at `w`."""
    replayed = replay(golden, tx)
    results = golden.results
    if golden.hyper["rho"] == 0:
        assert not any(key.startswith("pert/") for key in replayed)
        replayed |= {f"pert/{name}": x[:-1] for name, x in golden.tree("traj").items()}
    assert_agrees(results, replayed)


def _adamw_decaying_after(golden: Golden) -> optax.GradientTransformation:
    """The AdamW of the Momentum-SAM authors, which decays after the step."""
    hyper, rate = golden.hyper, golden.hyper["lr"]
    adam = torch_optimizer(hyper | {"weight_decay": 0.0}, rate, "adam")
    return optax.chain(adam, decay_after_step(rate, hyper["weight_decay"]))


def _rho_per_step(golden: Golden) -> Array:
    """The radius of each step, as an array."""
    rho = golden.hyper.get("rho_schedule") or [golden.hyper["rho"]] * golden.steps
    return np.asarray(rho[: golden.steps], dtype=float)


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


ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "sam": replay_sam,
    "asam_samsung": replay_asam_samsung,
    "adamw_sam": replay_adamw_sam,
    "msam": replay_msam,
    "adamw_msam": replay_adamw_msam,
}
