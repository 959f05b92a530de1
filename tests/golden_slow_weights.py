"""Adapters: methods that come back to an average, and the schedules of averaging."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import (
    ATOL,
    RTOL,
    Array,
    Golden,
    assert_agrees,
    compiled,
    problem,
    replay,
    torch_optimizer,
)


def replay_lookahead(golden: Golden) -> None:
    """Momentum kept, reset and pulled back.

    The official pull-back keeps no copy of the momentum to come back to, but the momentum itself.
    Where the file was recorded so, the recursion written by hand with that slip is held against the
    file, and flatopt against the same recursion without it.
    """
    hyper = golden.hyper
    kind = hyper["pullback"]
    base = torch_optimizer(hyper, golden.learning_rate, hyper["base"])
    tx = flatopt.lookahead(
        base,
        every=hyper["k"],
        slow_step_size=hyper["alpha"],
        reset_state=kind == "reset",
        pull_back=kind == "pullback",
    )
    replayed = replay(golden, tx)
    recorded = _with_slow_weights(golden)
    if kind != "pullback" or hyper.get("fix"):
        assert_agrees(recorded, replayed)
        return
    official = _pull_back_by_hand(golden, aliased=True)
    assert_agrees(recorded, official, ignore=["grad0"])
    corrected = _pull_back_by_hand(golden, aliased=False)
    assert_agrees(recorded | corrected, replayed)
    # The slip acts from the second synchronisation on, on what momentum there is.
    if golden.steps > 2 * hyper["k"] and 0 < hyper["alpha"] < 1 and hyper["momentum"] > 0:
        difference = [np.abs(corrected[k] - official[k]).max() for k in official]
        assert max(difference) > 1e5 * ATOL


def replay_lookahead_alphadl(golden: Golden) -> None:
    """These slow weights begin after the first step."""
    hyper = golden.hyper
    base = torch_optimizer(hyper, golden.learning_rate, hyper["base"])
    every = hyper["k"]
    tx = flatopt.lookahead(base, every=every, slow_step_size=hyper["alpha"], start=1 + every)
    assert_agrees(_with_slow_weights(golden), replay(golden, tx))


def _with_slow_weights(golden: Golden) -> dict[str, Array]:
    """The file's results, with the slow weights as those to evaluate."""
    results = golden.results
    for name, start in golden.tree("p0").items():
        results[f"eval/{name}"] = np.concatenate([start[None], results.pop(f"slow/{name}")])
    return results


def _pull_back_by_hand(golden: Golden, *, aliased: bool) -> dict[str, Array]:
    """Lookahead with pulled-back momentum in plain numpy; `aliased=True` copies the slip."""
    hyper, alpha = golden.hyper, golden.hyper["alpha"]
    loss_fn, batch = problem(golden)
    value_and_grad = compiled(jax.value_and_grad(loss_fn))
    rate = golden.learning_rate
    w = golden.tree("p0")
    slow, momentum = dict(w), {name: np.zeros_like(x) for name, x in w.items()}
    kept = dict(momentum)
    records = {f"{field}/{name}": [x] for field in ("traj", "eval") for name, x in w.items()}
    records["loss"] = []
    for t in range(golden.steps):
        loss, grads = value_and_grad({k: jnp.asarray(x) for k, x in w.items()}, *batch(t, 0))
        records["loss"].append(np.asarray(loss))
        lr = float(rate(t)) if callable(rate) else rate
        for k, g in grads.items():
            decayed = np.asarray(g) + hyper["weight_decay"] * w[k]
            momentum[k] = hyper["momentum"] * momentum[k] + decayed
            step = (
                decayed + hyper["momentum"] * momentum[k] if hyper.get("nesterov") else momentum[k]
            )
            w = w | {k: w[k] - lr * step}
        if (t + 1) % hyper["k"] == 0:
            for k in w:
                w = w | {k: alpha * w[k] + (1 - alpha) * slow[k]}
                slow[k] = w[k]
                momentum[k] = alpha * momentum[k]
                back = momentum[k] if aliased and t + 1 > hyper["k"] else kept[k]
                momentum[k] = momentum[k] + (1 - alpha) * back
                kept[k] = momentum[k]
        for k in w:
            records[f"traj/{k}"].append(w[k])
            records[f"eval/{k}"].append(slow[k])
    return {key: np.stack(values) for key, values in records.items()}


def replay_pswa(golden: Golden) -> None:
    """Restarts every P epochs, up to the start of the final phase."""
    hyper = golden.hyper
    begin, number, stop = hyper["pswa_start"], hyper["P"], hyper["swa_start"]
    restarts = range(begin + number, min(stop, hyper["epochs"]) + 1, number)
    _assert_restarts(golden, begin, restarts, period=number, stop=stop)


def replay_dswa(golden: Golden) -> None:
    begin, restart = (golden.hyper[key] for key in ("swa_start", "dswa_start"))
    _assert_restarts(golden, begin, [restart], period=[restart - begin])


def replay_tswa(golden: Golden) -> None:
    begin, first, second = (golden.hyper[f"{key}swa_start"] for key in ("", "d", "t"))
    _assert_restarts(golden, begin, [first, second], period=[first - begin, second - first])


def _assert_restarts(
    golden: Golden,
    begin: int,
    restarts: Sequence[int],
    period: int | Sequence[int],
    stop: int | None = None,
) -> None:
    """Replays periodic averaging; all numbers are of epochs.

    Where it restarts, the file has the weights before the restart, and flatopt has those after it:
    the average. The weights before it are recovered from the average that they entered.
    """
    steps, hyper = golden.epoch_len, golden.hyper
    updates = period * steps if isinstance(period, int) else [n * steps for n in period]
    tx = flatopt.periodic_swa(
        torch_optimizer(hyper, golden.learning_rate),
        updates,
        start=(begin + 1) * steps,
        every=steps,
        stop=None if stop is None else stop * steps,
    )
    replayed = replay(golden, tx)
    results = golden.results
    before = [begin, *(epoch for epoch in restarts if epoch * steps <= golden.steps)]
    for name in golden.tree("p0"):
        evaluated = replayed[f"eval/{name}"]
        starts = replayed[f"traj/{name}"][:-1:steps]
        replayed[f"epoch_start/{name}"] = starts
        trajectory = replayed[f"traj/{name}"].copy()
        for last, epoch in itertools.pairwise(before):
            t, number = epoch * steps, epoch - last
            np.testing.assert_allclose(trajectory[t], results[f"eval/{name}"][t], RTOL, ATOL)
            mean, old = evaluated[t], evaluated[t - steps]
            trajectory[t] = mean if number == 1 else old + number * (mean - old)
        replayed[f"traj/{name}"] = trajectory
    assert_agrees(results, replayed)


def compare_schedules(golden: Golden) -> None:
    """Tables of learning rates, under `family/name/field`."""
    compared = 0
    for key in golden.arrays:
        family, _, rest = key.partition("/")
        if rest.split("/")[-1] != "lr":
            continue
        folder = key.removesuffix("lr")
        table = golden.arrays[key]
        hyper = json.loads(str(golden.arrays[f"{folder}hyper"]))
        schedule, first = _SCHEDULES[family](hyper)
        counts = jnp.arange(first, first + len(table))
        np.testing.assert_allclose(jax.vmap(schedule)(counts), table, RTOL, ATOL, err_msg=key)
        if f"{folder}collect_after_epoch" in golden.arrays:
            _assert_collects(hyper, len(table), golden.arrays[f"{folder}collect_after_epoch"])
        compared += 1
    assert compared > 0


def _assert_collects(hyper: dict[str, Any], steps: int, epochs: Array) -> None:
    """Snapshots are taken after the epochs, counted from 0, that the file names."""
    period = hyper["cycle"] * hyper["iters"]
    stage = flatopt.snapshots(len(epochs) + 1, start=period // 2, every=period)

    def step(carry: Any, _: None) -> Any:
        count, state = carry
        updates, state = stage.update(jnp.ones(()), state, count)
        return (count + updates, state), None

    start = (jnp.zeros(()), stage.init(jnp.zeros(())))
    (_, state), _ = jax.lax.scan(step, start, length=steps)
    stack, number = flatopt.snapshot_params(state)
    np.testing.assert_array_equal(stack[:number], (epochs + 1) * hyper["iters"])


def _swalr(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    shape = {"cos": "cosine", "linear": "linear"}[hyper["anneal"]]
    return flatopt.swa_schedule(hyper["lr"], hyper["swa_lr"], hyper["anneal_epochs"], 0, shape), 0


def _swa_repo(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    end, rate = hyper["swa_start"], hyper["swa_lr"]
    if not hyper["swa"]:
        end, rate = hyper["epochs"], 0.01 * hyper["lr_init"]
    return flatopt.swa_schedule(hyper["lr_init"], rate, 0.4 * end, 0.5 * end, "linear"), 0


def _curve_train(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    """The same shape, with epochs counted from 1."""
    end, rate = hyper["total"], hyper["base_lr"]
    return flatopt.swa_schedule(rate, 0.01 * rate, 0.4 * end, 0.5 * end, "linear"), 1


def _fge(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    period = hyper["cycle"] * hyper["iters"]
    return flatopt.cyclic_triangle_schedule(hyper["lr_1"], hyper["lr_2"], period), 0


_SCHEDULES: dict[str, Callable[[dict[str, Any]], tuple[optax.Schedule, int]]] = {
    "swalr": _swalr,
    "swa_repo": _swa_repo,
    "curve_train": _curve_train,
    "fge": _fge,
}

ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "lookahead": replay_lookahead,
    "lookahead_alphadl": replay_lookahead_alphadl,
    "pswa": replay_pswa,
    "dswa": replay_dswa,
    "tswa": replay_tswa,
    "schedules": compare_schedules,
}
