"""Adapters: how each recorded variant of SAM is built from flatopt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from tests.replay import (
    Golden,
    Params,
    assert_agrees,
    logits,
    mlp_losses,
    problem,
    replay,
    table,
    torch_optimizer,
)


def replay_gsam(golden: Golden) -> None:
    """The official PyTorch loop leaves radius and learning rate a step apart: both are recorded."""
    hyper = golden.hyper
    rho = table(golden.arrays["rho_t"])
    perturbation = flatopt.scale_to_adaptive_norm(rho) if hyper["adaptive"] else None
    stage = flatopt.gsam(rho, hyper["alpha"], perturbation=perturbation)
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))


def replay_gsam_bigvision(golden: Golden) -> None:
    """`gsam/` is the gradient that the optimiser gets; without momentum its trace is the last."""
    hyper = golden.hyper
    learning_rate = table(hyper["lr_list"])
    bounds = (hyper["rho_max"], hyper["rho_min"], hyper["lr_max"], hyper["lr_min"])
    rho = flatopt.proportional_rho_schedule(learning_rate, *bounds)
    stage = flatopt.gsam(
        rho,
        hyper["alpha"],
        perturbation=flatopt.scale_to_weighted_norm(rho) if hyper["adaptive"] else None,
        minimise_perturbed=hyper["minimize_fp"],
    )
    tx = optax.chain(stage, torch_optimizer(hyper, learning_rate))
    buffers = {"gsam": lambda s: optax.tree.get(s, "trace")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))


def replay_gnp(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.gnp(hyper["r"], hyper["alpha"], normalise_clean=hyper["norm_perturbations"])
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))


def replay_wsam(golden: Golden) -> None:
    hyper, rate = golden.hyper, golden.learning_rate
    tx = flatopt.wsam(
        torch_optimizer(hyper, rate, hyper["base"]),
        rate,
        **{name: hyper[name] for name in ("rho", "gamma", "decouple", "adaptive", "max_norm")},
    )
    assert_agrees(golden.results, replay(golden, tx))


def replay_fsam(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.friendly_sam(
        hyper["rho"], sigma=hyper["sigma"], decay=hyper["lmbda"], adaptive=hyper["adaptive"]
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    buffers = {"ema": lambda s: optax.tree.get(s, "ema")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))


def replay_ssam(golden: Golden) -> None:
    mask = {name: jnp.asarray(m, bool) for name, m in golden.tree("mask").items()}
    stage = flatopt.sparse_sam(golden.hyper["rho"], mask, epsilon=1e-7)
    tx = optax.chain(stage, torch_optimizer(golden.hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))


def replay_looksam(golden: Golden) -> None:
    hyper = golden.hyper
    stage = flatopt.looksam(hyper["rho"], every=hyper["k"], alpha=hyper["alpha"])
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    buffers = {"v_unit": lambda s: optax.tree.get(s, "direction")}
    assert_agrees(golden.results, replay(golden, tx, buffers=buffers))


def replay_rwp(golden: Golden) -> None:
    """The displaced gradient is taken on the second batch of a step, if there are two."""
    hyper = golden.hyper
    stage = flatopt.rwp(
        hyper["gamma"], alpha=hyper["alpha"], filter_axis=0, noise=_recorded(golden)
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx, extra_batch=lambda t, i: (t, 1)))


def replay_arwp(golden: Golden) -> None:
    hyper = golden.hyper
    noise = _recorded(golden)
    stage = flatopt.arwp(
        hyper["std"], eta=hyper["eta"], decay=hyper["beta"], filter_axis=0, noise=noise
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    assert_agrees(golden.results, replay(golden, tx))


def replay_esam(golden: Golden) -> None:
    """The official selection is strict; from a share of 0.99 on it takes the whole batch."""
    hyper = golden.hyper
    assert hyper["beta"] == 1, "the official code draws its mask with Python's generator"
    share = 1.0 if hyper["gamma"] >= 0.99 else hyper["gamma"]

    def extra_grad(params: Params, point: Params, batch: tuple[jax.Array, ...]) -> Params:
        clean_losses = mlp_losses(params, *batch)
        grad_fn = flatopt.make_selective_grad_fn(
            mlp_losses, *batch, clean_losses=clean_losses, share=share, strict=True
        )
        return grad_fn(point, 0)

    stage = flatopt.esam(hyper["rho"], beta=hyper["beta"], epsilon=1e-7)
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    replayed = replay(golden, tx, extra_grad=extra_grad)
    _, batch = problem(golden)
    replayed["n_selected"] = np.array(
        [
            flatopt.select_examples(
                *(
                    mlp_losses({k: x[t] for k, x in golden.tree(field).items()}, *batch(t, 0))
                    for field in ("traj", "pert")
                ),
                share,
                strict=True,
            ).sum()
            for t in range(golden.steps)
        ]
    )
    assert_agrees(golden.results, replayed)


def replay_sampa(golden: Golden) -> None:
    """The ascent gradient is taken on the batch before; the loss smooths its labels."""
    hyper = golden.hyper
    epoch = np.arange(golden.steps) // hyper["steps"]
    rate = table(0.5 * hyper["lr"] * (1 + np.cos(np.pi * epoch / hyper["epochs"])))
    tx = flatopt.sampa(torch_optimizer(hyper, rate), hyper["rho"], mix=hyper["og"])

    def previous_first(t: Any, i: Any) -> tuple[Any, int]:
        return jnp.where(i == 0, jnp.maximum(t - 1, 0), t), 0

    replayed = replay(golden, tx, loss_fn=_smoothed_loss, extra_batch=previous_first)
    # `grad0` is that of the loss without smoothing.
    loss_fn, batch = problem(golden)
    grads = jax.grad(loss_fn)(golden.params, *batch(0, 0))
    replayed |= {f"grad0/{name}": np.asarray(g) for name, g in grads.items()}
    assert_agrees(golden.results, replayed)


def _smoothed_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy with 0.1 of the label spread over the wrong classes."""
    log_p = jax.nn.log_softmax(logits(params, x))
    classes = log_p.shape[-1]
    right = jax.nn.one_hot(y, classes)
    target = 0.9 * right + 0.1 / (classes - 1) * (1 - right)
    return -jnp.mean(jnp.sum(target * log_p, axis=-1))


def _recorded(golden: Golden) -> optax.GradientTransformation:
    """The recorded draws, one a step."""
    draws = {name: jnp.asarray(z) for name, z in golden.tree("z").items()}

    def update(updates: Any, step: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del updates, params
        return {name: z[step] for name, z in draws.items()}, step + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)


ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "gsam": replay_gsam,
    "gsam_bigvision": replay_gsam_bigvision,
    "gnp": replay_gnp,
    "wsam": replay_wsam,
    "fsam": replay_fsam,
    "ssam": replay_ssam,
    "looksam": replay_looksam,
    "rwp": replay_rwp,
    "arwp": replay_arwp,
    "esam": replay_esam,
    "sampa": replay_sampa,
}
