"""Time of a jitted training step of each method over its base optimiser, in one process.

    python -m benchmarks.step_time --repeats 9 --json benchmarks/results/step_time.json

Next to each method stand what a user would write by hand and what optax offers.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flatopt
from benchmarks import record, timing

WIDTHS = (3072, 1024, 1024, 1024, 1024, 10)
BATCH_SIZE = 64
LEARNING_RATE, MOMENTUM, RHO = 0.01, 0.9, 0.05
BASE = "sgd"
EMA_DECAY = 0.999

Carry = tuple[Any, Any]


def init_params(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights of a ReLU network, He-scaled."""
    sizes = list(itertools.pairwise(WIDTHS))
    keys = jax.random.split(key, len(sizes))
    return [
        {"kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, (m, n) in zip(keys, sizes, strict=True)
    ]


def loss_fn(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ last["kernel"] + last["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def sgd() -> optax.GradientTransformationExtraArgs:
    """The base optimiser of every method."""
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def methods() -> dict[str, optax.GradientTransformationExtraArgs]:
    """The optimisers under test."""
    return {
        BASE: sgd(),
        "sam": optax.chain(flatopt.sam(RHO), sgd()),
        "asam": optax.chain(flatopt.asam(RHO), sgd()),
        "sam every=5": optax.chain(flatopt.sam(RHO, every=5), sgd()),
        "msam": flatopt.msam(sgd(), RHO),
        "swa": optax.chain(sgd(), flatopt.swa()),
        "params_ema": optax.chain(sgd(), flatopt.params_ema(EMA_DECAY)),
    }


def train_step(tx: optax.GradientTransformationExtraArgs, x: jax.Array, y: jax.Array) -> Any:
    """The compiled step of a training loop with flatopt."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Carry) -> Carry:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, x, y)
        grad_fn = flatopt.make_grad_fn(loss_fn, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    return step


def sam_by_hand(x: jax.Array, y: jax.Array) -> Any:
    """The least that SAM needs, without any library but optax's SGD."""
    optimizer = sgd()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Carry) -> Carry:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, x, y)
        scale = RHO / (optax.tree.norm(grads) + 1e-12)
        perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        grads = jax.grad(loss_fn)(perturbed, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def optax_sam(x: jax.Array, y: jax.Array, *, opaque: bool) -> tuple[Any, Callable[[Any], Any]]:
    """`optax.contrib.sam`: its step, one whole SAM step a call, and its init."""
    adversarial = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(sgd(), adversarial, sync_period=2, opaque_mode=opaque)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Carry) -> Carry:
        params, opt_state = carry
        for _ in range(1 if opaque else 2):
            grads = jax.grad(loss_fn)(params, x, y)
            extra = {"grad_fn": lambda p, _: jax.grad(loss_fn)(p, x, y)} if opaque else {}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    return step, lambda params: tx.init(jax.tree.map(jnp.copy, params))


def measure(repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every variant."""
    key_x, key_y, key_w = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (BATCH_SIZE, WIDTHS[0]))
    y = jax.random.randint(key_y, (BATCH_SIZE,), 0, WIDTHS[-1])
    variants: dict[str, tuple[Any, Any]] = {}

    def add(name: str, step: Any, init: Callable[[Any], Any]) -> None:
        params = init_params(key_w)
        # Transparent optax SAM aliases its parameters in its state, which forbids donation.
        variants[name] = (step, jax.tree.map(jnp.copy, (params, init(params))))

    for name, tx in methods().items():
        add(name, train_step(tx, x, y), tx.init)
    add("sam, by hand", sam_by_hand(x, y), sgd().init)
    add("optax.contrib.sam, opaque", *optax_sam(x, y, opaque=True))
    add("optax.contrib.sam, transparent", *optax_sam(x, y, opaque=False))
    return timing.interleaved_seconds(variants, repeats, steps)


def main() -> None:
    """Measures, prints a table and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a round (5)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.steps < 1:
        parser.error("--repeats and --steps must be at least 1.")
    seconds = measure(arguments.repeats, arguments.steps)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "over_base": timing.ratio(values, seconds[BASE]),
        }
        for name, values in seconds.items()
    }
    print(f"{'variant':32} {'ms':>8} {'over sgd':>9}  range")
    for name, row in rows.items():
        r = row["over_base"]
        print(
            f"{name:32} {row['milliseconds']:8.2f} {r['median']:9.3f}  "
            f"{r['min']:.3f} to {r['max']:.3f}"
        )
    if arguments.json:
        settings = {"repeats": arguments.repeats, "steps": arguments.steps}
        model = {"widths": WIDTHS, "batch_size": BATCH_SIZE}
        record.write(arguments.json, {"settings": settings, "model": model, "variants": rows})


if __name__ == "__main__":
    main()
