"""SGD that looks at its own Hessian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.replay import RTOL, Golden, assert_agrees, mlp_loss, replay, replays

# What a replay starts from, and what is compared beside the trajectory.
GIVEN = ["lanczos_start", "learned_at_step", "momentum_t", "ritz_values", "ritz_weights"]
PROGRAMS = {
    "run_ssgd_fastanddirty.py": "median",
    "run_ssgdm_fastanddirty.py": "authors",
    "run_ssgdmn_fastanddirty.py": "normalised",
}


def _rule(golden: Golden) -> dict[str, Any]:
    hyper = golden.hyper
    mu = "median" if hyper.get("type") == "median" else "smallest"
    return {"num_steps": hyper["lanczos_iters"], "rule": PROGRAMS[hyper["script"]], "mu": mu}


def _with_recorded_starts(
    golden: Golden, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`tx` with the recorded start of Lanczos's process at each recorded step."""
    learned = jnp.asarray(golden.arrays["learned_at_step"])
    starts = jnp.asarray(golden.arrays["lanczos_start"])
    shapes = {name: w.shape for name, w in golden.tree("p0").items()}  # In the file's order.
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])[:-1]

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        flat = starts[jnp.searchsorted(learned, state[0])]
        parts = zip(shapes, jnp.split(flat, ends), strict=True)
        start = {name: part.reshape(shapes[name]) for name, part in parts}
        step, inner = state
        updates, inner = tx.update(updates, inner, params, start_vector=start, **extra_args)
        return updates, (step + 1, inner)

    def init(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), tx.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


@replays("lanczos_lr")
def test_replays(golden: Golden) -> None:
    """The Hessian is of the first rows, of the loss alone; the decay is in the gradient."""
    hyper = golden.hyper
    rows = slice(hyper["curvature_rows"])
    data = tuple(jnp.asarray(golden.arrays[key])[rows] for key in ("X", "Y"))
    epoch = hyper["steps_per_epoch"]
    tx = flatopt.sgd_by_curvature(
        hyper["lr_init"],
        momentum=hyper["momentum"],
        start=hyper["warmstart"] * epoch,
        every=hyper["epochfreq"] * epoch,
        max_learning_rate=1e9,
        **_rule(golden),
    )
    tx = optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"]), _with_recorded_starts(golden, tx)
    )
    replayed = replay(
        golden,
        tx,
        extra_grad=lambda _, point, __: jax.grad(mlp_loss)(point, *data),
        buffers={
            "rate": lambda s: {
                "lr_t": optax.tree.get(s, "learning_rate"),
                "momentum_t": optax.tree.get(s, "momentum"),
            }
        },
    )
    for name in ("lr_t", "momentum_t"):
        np.testing.assert_allclose(replayed[f"rate/{name}"], golden.arrays[name], RTOL, err_msg=name)
    assert_agrees(golden.results, replayed, ignore=GIVEN)
