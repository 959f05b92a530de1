"""BatchNorm statistics: the recorded runs, and means over batches of any framework."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.replay import ATOL, RTOL, Golden, Params, assert_agrees, replay, replays, torch_optimizer


@replays("sam_swa_bn")
def test_replays(golden: Golden) -> None:
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


def test_statistics_of_any_framework():
    stats = [{"mean": jnp.full(2, float(i)), "count": jnp.array(i)} for i in range(3)]
    weighted = flatopt.average_batch_stats(iter(stats), sizes=[1, 1, 2])
    np.testing.assert_allclose(weighted["mean"], 1.25)
    assert weighted["count"] == 2
    half = flatopt.average_batch_stats([jnp.ones(2, jnp.bfloat16)] * 3)
    assert half.dtype == jnp.bfloat16
    for some, sizes in (([], []), (stats, [1, 2])):
        with pytest.raises(ValueError, match="a size for each"):
            flatopt.average_batch_stats(some, sizes)
