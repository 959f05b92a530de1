"""SAM for a network with BatchNorm and dropout in Flax linen: `python -m examples.sam_linen`.

The statistics are those of the clean pass, and both passes have the same dropout mask: the loss
closes over them, `has_aux=True` hands the statistics out of the clean pass, and `grad_fn` drops
those of the other.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import flatopt
from examples import digits
from examples.models.cnn import CNN
from examples.models.wide_resnet import WideResNet
from flatopt.linen import TrainState

BATCH_SIZE = 64


def create_state(
    model: nn.Module, tx: optax.GradientTransformation, image: jax.Array, seed: int = 0
) -> TrainState:
    """The state before the first step; `image` gives the shape, [1, height, width, channels]."""
    variables = model.init(jax.random.key(seed), image)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step; returns the new state and the loss of the clean pass."""
    dropout_key = jax.random.fold_in(key, state.step)

    def loss_fn(
        params: optax.Params, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, optax.Params]:
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new["batch_stats"]

    grad_fn = flatopt.make_grad_fn(loss_fn, images, labels, has_aux=True)
    (loss, batch_stats), grads = grad_fn.value_and_grad(state.params)
    state = state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=batch_stats)
    return state, loss


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of images classified rightly by the weights to evaluate."""
    variables = {"params": state.eval_params, "batch_stats": state.batch_stats}
    return jnp.mean(jnp.argmax(state.apply_fn(variables, images), -1) == labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints the loss on the way and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["cnn", "wide_resnet"], default="cnn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rho", type=float, default=0.1)
    args = parser.parse_args(argv)

    data = digits.load()
    model = CNN() if args.model == "cnn" else WideResNet(depth=10, width=1, dropout=0.1)
    tx = optax.chain(
        flatopt.sam(args.rho),
        optax.add_decayed_weights(5e-4),
        optax.sgd(optax.cosine_decay_schedule(0.1, args.steps), momentum=0.9),
    )
    state, key = create_state(model, tx, data.train[0][:1]), jax.random.key(1)
    for i, batch in enumerate(digits.batches(data.train, args.steps, BATCH_SIZE), start=1):
        state, loss = train_step(state, *batch, key)
        if i % max(1, args.steps // 4) == 0:
            print(f"step {i}: training loss {loss:.3f}")
    print(f"{args.model}, {args.steps} steps of SAM on {len(data.train[1])} digits, one seed")
    print(f"test accuracy: {100 * accuracy(state, *data.test):.2f} %")


if __name__ == "__main__":
    main()
