"""SAM and weight averaging in plain JAX: `python -m examples.sam_plain`.

A network of two matrices and no library but JAX and optax: what SAM asks of a training loop is the
line `grad_fn = ...` and handing it on.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flatopt
from examples import digits

Params = dict[str, jax.Array]
HIDDEN = 64
BATCH_SIZE = 64


def init(key: jax.Array) -> Params:
    """A network from 64 pixels to 10 classes."""
    keys = jax.random.split(key)
    return {
        "first": jax.random.normal(keys[0], (64, HIDDEN)) * (2 / 64) ** 0.5,
        "second": jax.random.normal(keys[1], (HIDDEN, 10)) * (2 / HIDDEN) ** 0.5,
        "bias": jnp.zeros(10),
    }


def logits(params: Params, images: jax.Array) -> jax.Array:
    """What the network says of `images`."""
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["first"])
    return hidden @ params["second"] + params["bias"][None]


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return jnp.mean(losses)


def train(
    tx: optax.GradientTransformationExtraArgs, params: Params, data: digits.Digits, steps: int
) -> tuple[Params, Any]:
    """Trains, and returns the parameters and the optimiser's state."""

    @jax.jit
    def step(
        params: Params, opt_state: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[Params, Any]:
        grad_fn = flatopt.make_grad_fn(loss_fn, images, labels)
        _, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for images, labels in digits.batches(data.train, steps, BATCH_SIZE):
        params, opt_state = step(params, opt_state, images, labels)
    return params, opt_state


def accuracy(params: Params, data: digits.Digits) -> float:
    """Share of test images classified rightly."""
    images, labels = data.test
    return float(jnp.mean(jnp.argmax(logits(params, images), -1) == labels))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints the test accuracy of the last and of the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rho", type=float, default=0.1)
    args = parser.parse_args(argv)

    data = digits.load()
    tx = optax.chain(
        flatopt.sam(args.rho),
        optax.sgd(0.1, momentum=0.9),
        flatopt.swa(start=max(1, args.steps // 2), every=10),
    )
    params, opt_state = train(tx, init(jax.random.key(0)), data, args.steps)
    print(f"{args.steps} steps of SAM on {len(data.train[1])} digits, one seed")
    for name, weights in (
        ("the last weights", params),
        ("their average", flatopt.eval_params(opt_state, params)),
    ):
        print(f"test accuracy of {name}: {100 * accuracy(weights, data):.2f} %")


if __name__ == "__main__":
    main()
