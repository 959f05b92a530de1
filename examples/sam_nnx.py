"""SAM and SWA for a Transformer with dropout in Flax nnx: `python -m examples.sam_nnx`.

`flatopt.nnx.make_grad_fn` splits the module before the forward pass, so that both passes have the
same dropout mask, and `apply_eval_params` gives a copy with the averaged weights.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flatopt
import flatopt.nnx
from examples import digits
from examples.models.transformer import ImageClassifier

BATCH_SIZE = 64


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return jnp.mean(losses)


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step, in place; returns the loss of the clean pass."""
    grad_fn = flatopt.nnx.make_grad_fn(loss_fn, model, images, labels)
    loss, grads = grad_fn.value_and_grad(model)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss


@nnx.jit
def accuracy(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of images classified rightly."""
    return jnp.mean(jnp.argmax(model(images), -1) == labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints the test accuracy of the last and of the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rho", type=float, default=0.05)
    args = parser.parse_args(argv)

    data = digits.load()
    model = ImageClassifier((8, 8, 1), patch=2, width=32, rngs=nnx.Rngs(0))
    tx = optax.chain(
        flatopt.sam(args.rho),
        optax.adamw(3e-3, weight_decay=1e-2),
        flatopt.swa(start=max(1, 3 * args.steps // 4), every=5),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i, batch in enumerate(digits.batches(data.train, args.steps, BATCH_SIZE), start=1):
        loss = train_step(model, optimizer, *batch)
        if i % max(1, args.steps // 4) == 0:
            print(f"step {i}: training loss {loss:.3f}")
    averaged = flatopt.nnx.apply_eval_params(optimizer, model)
    print(f"{args.steps} steps of SAM on {len(data.train[1])} digits, one seed")
    for name, evaluated in (("the last weights", model), ("their average", averaged)):
        evaluated.eval()  # No dropout.
        print(f"test accuracy of {name}: {100 * accuracy(evaluated, *data.test):.2f} %")


if __name__ == "__main__":
    main()
