"""Adapters: how each recorded averaging method is built from flatopt."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.golden_sam import assert_sam_agrees
from tests.replay import (
    ATOL,
    RTOL,
    Golden,
    Params,
    assert_agrees,
    replay,
    torch_optimizer,
)


def replay_swa_torch(golden: Golden) -> None:
    hyper = golden.hyper
    average = flatopt.swa(start=hyper["start"], every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


def replay_ema_torch(golden: Golden) -> None:
    """PyTorch's average starts from the first weights: no debiasing."""
    hyper = golden.hyper
    average = flatopt.params_ema(
        hyper["decay"], debias=False, start=hyper["start"], every=hyper["freq"]
    )
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


def replay_swa_repo(golden: Golden) -> None:
    """The SWA authors count epochs from 1 and average after each one that is due.

    Their start is a float, and an epoch is due at a whole distance from it: none is when the start
    is not whole.
    """
    hyper, epoch_len = golden.hyper, golden.epoch_len
    tx = torch_optimizer(hyper, golden.learning_rate)
    if hyper.get("swa", True) and float(hyper["swa_start"]).is_integer():
        start, every = int(hyper["swa_start"]), int(hyper["swa_c_epochs"])
        tx = optax.chain(tx, flatopt.swa(start=start * epoch_len, every=every * epoch_len))
    assert_agrees(golden.results, replay(golden, tx))


def replay_wasam(golden: Golden) -> None:
    hyper, epoch_len = golden.hyper, golden.epoch_len
    base = torch_optimizer(hyper, golden.learning_rate)
    start = hyper["swa_start_epoch"] * epoch_len
    tx = flatopt.wasam(base, hyper["rho"], start=start, every=epoch_len)
    assert_sam_agrees(golden, tx)


def replay_lawa(golden: Golden) -> None:
    """The official average holds the first weights until its start, while it collects already."""
    hyper = golden.hyper
    average = flatopt.lawa(hyper["k"], every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    results, replayed = golden.results, replay(golden, tx)
    first = max(1, -(-hyper["start_steps"] // hyper["freq"])) * hyper["freq"]
    for name in golden.tree("traj"):
        average_there = results[f"eval/{name}"]
        np.testing.assert_array_equal(
            average_there[1:first], average_there[:1].repeat(first - 1, 0)
        )
        average_there[:first] = replayed[f"eval/{name}"][:first]
    assert_agrees(results, replayed)


def replay_swag(golden: Golden) -> None:
    """Means, second moments, deviations, and the sample that the recorded draws make."""
    hyper, rank = golden.hyper, golden.hyper["K"]
    stage = flatopt.swag(rank, start=_first(golden, "collect_at_step"), every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), stage)
    fields = ("mean", "variance", "deviations")
    buffers = {f"kept_{f}": lambda s, f=f: getattr(s[-1], f) for f in fields}
    replayed = replay(golden, tx, buffers=buffers)
    steps = golden.arrays["collect_at_step"]
    kept = {f: {k: replayed[f"kept_{f}/{k}"] for k in golden.tree("p0")} for f in fields}
    number = jnp.asarray(len(steps))
    for name, stack in kept["deviations"].items():  # Oldest first, as the recorded draws are.
        turn = -(len(steps) % rank) if len(steps) > rank else 0
        kept["deviations"][name] = np.roll(stack, turn, axis=1)
    state = flatopt.SwagState(
        jnp.asarray(golden.steps), number, *({k: x[-1] for k, x in kept[f].items()} for f in fields)
    )
    noise, columns = _unflatten(golden), int(state.columns())
    # The official divisor is that of a full set of columns, also before there are so many.
    low_rank = np.zeros(rank)
    low_rank[:columns] = golden.arrays["z_lowrank"] * np.sqrt(max(columns - 1, 1) / (rank - 1))
    # The factor 1/2 of the paper's covariance is part of `scale` there.
    sample = state.sample(noise, jnp.asarray(low_rank), 2 * hyper["scale"])
    results = {k: v for k, v in golden.results.items() if k.split("/")[0] not in _SWAG_INPUTS}
    for name, trajectory in golden.tree("traj").items():
        mean = kept["mean"][name]
        replayed[f"mean/{name}"] = mean[steps - 1]
        replayed[f"sq_mean/{name}"] = (kept["variance"][name] + mean**2)[steps - 1]
        stack = kept["deviations"][name][-1, :columns]
        replayed[f"cov_mat_sqrt/{name}"] = stack.reshape(columns, -1)
        replayed[f"sample/{name}"] = np.asarray(sample[name])
        held = np.searchsorted(steps, np.arange(golden.steps + 1), "right")
        shape = (-1, *[1] * (trajectory.ndim - 1))
        recorded = golden.arrays[f"mean/{name}"][np.maximum(held - 1, 0)]
        results[f"eval/{name}"] = np.where((held > 0).reshape(shape), recorded, trajectory)
    assert_agrees(results, replayed)


_SWAG_INPUTS = ("collect_at_step", "param_order", "z_diag", "z_lowrank")


def _unflatten(golden: Golden) -> Params:
    """The recorded draws for the diagonal part, tensor by tensor."""
    shapes = {
        str(name): golden.tree("p0")[str(name)].shape for name in golden.arrays["param_order"]
    }
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    parts = np.split(golden.arrays["z_diag"], ends[:-1])
    return {
        name: jnp.asarray(part.reshape(shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _first(golden: Golden, field: str) -> int:
    """The first of the recorded step numbers, or one past the end."""
    return int(next(iter(golden.arrays[field]), golden.steps + 1))


def replay_gadam(golden: Golden) -> None:
    hyper = golden.hyper
    b1, b2 = hyper.get("betas", (0.9, 0.999))
    shared = {
        "weight_decay": hyper["weight_decay"],
        "start": _first(golden, "avg_at_step"),
        "every": hyper["freq"],
    }
    shared |= {"b1": b1, "b2": b2, "eps": hyper.get("eps", 1e-8)}
    if hyper["opt"] == "Gadam":
        tx = flatopt.gadam(hyper["lr"], **shared)
    else:
        tx = flatopt.gadamx(hyper["lr"], partial=hyper["partial"], **shared)
    assert_agrees(golden.results, replay(golden, tx))


def replay_sam_swa_bn(golden: Golden) -> None:
    """SAM with BatchNorm: statistics of the clean pass, then both forms of the average's."""
    hyper, arrays = golden.hyper, golden.arrays
    base = torch_optimizer(hyper, golden.learning_rate)
    tx = flatopt.wasam(base, hyper["rho"], start=hyper["swa_start"])
    replayed = replay(golden, tx, loss_fn=lambda *args: _batch_norm_loss(*args)[0])
    average = {name: jnp.asarray(replayed[f"eval/{name}"][-1]) for name in golden.tree("p0")}

    x, y = (jnp.asarray(arrays[key]) for key in ("X", "Y"))
    running = {"mean": np.zeros_like(arrays["running_mean"][0])}
    running["var"] = np.ones_like(running["mean"])
    for t in range(golden.steps):
        params = {name: jnp.asarray(replayed[f"traj/{name}"][t]) for name in average}
        rows = arrays["batch_idx"][t, 0]
        grad_fn = flatopt.make_grad_fn(_batch_norm_loss, x[rows], y[rows], has_aux=True)
        (_, stats), _ = grad_fn.value_and_grad(params)
        running = {k: 0.9 * old + 0.1 * np.asarray(stats[k]) for k, old in running.items()}
        for k, value in running.items():
            np.testing.assert_allclose(value, arrays[f"running_{k}"][t], RTOL, ATOL)

    sizes = arrays["chunk_sizes"]
    chunks = [
        _batch_norm_loss(average, x[end - size : end], y[end - size : end])[1]
        for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]
    for field, weights in (("swa_repo_bn", sizes), ("torch_update_bn", None)):
        recomputed = flatopt.average_batch_stats(chunks, weights)
        for k, value in recomputed.items():
            np.testing.assert_allclose(value, arrays[f"{field}_{k}"], RTOL, ATOL)

    fields = ("traj", "pert", "avg")
    replayed |= {f"avg/{name}": np.asarray(value) for name, value in average.items()}
    recorded = {k: v for k, v in arrays.items() if k.split("/")[0] in fields}
    assert_agrees(recorded, replayed)


def _batch_norm_loss(params: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Params]:
    """Cross-entropy of a network with BatchNorm, and the statistics of the batch.

    The running variance is the unbiased one, the normalising one is not, as in PyTorch.
    """
    hidden = x @ params["fc1.weight"].T + params["fc1.bias"][None]
    mean, var = hidden.mean(0), hidden.var(0)
    normal = (hidden - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    hidden = jnp.tanh(normal * params["bn.weight"][None] + params["bn.bias"][None])
    logits = hidden @ params["fc2.weight"].T + params["fc2.bias"][None]
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
    return loss, {"mean": mean, "var": var * len(x) / (len(x) - 1)}


ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "swa_repo": replay_swa_repo,
    "swa_torch": replay_swa_torch,
    "ema_torch": replay_ema_torch,
    "wasam": replay_wasam,
    "lawa": replay_lawa,
    "swag": replay_swag,
    "gadam": replay_gadam,
    "sam_swa_bn": replay_sam_swa_bn,
}
