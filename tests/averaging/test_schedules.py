"""Tables of learning rates, as the authors' programs have them."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import ATOL, RTOL, Array, Golden, replays


@replays("schedules")
def test_replays(golden: Golden) -> None:
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


def _to_swa(high: float, low: float, steps: float, begin: float, shape: str) -> optax.Schedule:
    return flatopt.swa_schedule(
        high, low, transition_steps=steps, transition_begin=begin, shape=shape
    )


def _swalr(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    shape = {"cos": "cosine", "linear": "linear"}[hyper["anneal"]]
    return _to_swa(hyper["lr"], hyper["swa_lr"], hyper["anneal_epochs"], 0, shape), 0


def _swa_repo(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    end, rate = hyper["swa_start"], hyper["swa_lr"]
    if not hyper["swa"]:
        end, rate = hyper["epochs"], 0.01 * hyper["lr_init"]
    return _to_swa(hyper["lr_init"], rate, 0.4 * end, 0.5 * end, "linear"), 0


def _curve_train(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    """The same shape, with epochs counted from 1."""
    end, rate = hyper["total"], hyper["base_lr"]
    return _to_swa(rate, 0.01 * rate, 0.4 * end, 0.5 * end, "linear"), 1


def _fge(hyper: dict[str, Any]) -> tuple[optax.Schedule, int]:
    period = hyper["cycle"] * hyper["iters"]
    return flatopt.cyclic_triangle_schedule(hyper["lr_1"], hyper["lr_2"], period=period), 0


_SCHEDULES: dict[str, Callable[[dict[str, Any]], tuple[optax.Schedule, int]]] = {
    "swalr": _swalr,
    "swa_repo": _swa_repo,
    "curve_train": _curve_train,
    "fge": _fge,
}
