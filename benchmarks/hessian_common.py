"""What the benchmarks of the measures share: data, networks and their training."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from examples import digits


def flat_digits(train_size: int) -> digits.Digits:
    """The digits, split, each image a vector."""
    return digits.Digits(
        *((x.reshape(len(x), -1), y) for x, y in digits.load(train_size)),
    )


def init_mlp(seed: int, sizes: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
    """A ReLU network, He's initialisation, in Flax's layout."""
    rng = np.random.default_rng(seed)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def logits(params: Any, batch: Any) -> jax.Array:
    """Dense layers with ReLU between them."""
    x = batch[0]
    for i in range(len(params)):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch[1])
    return jnp.mean(losses)


def error_fn(params: Any, batch: Any) -> jax.Array:
    """Share of examples classified wrongly."""
    return jnp.mean(jnp.argmax(logits(params, batch), axis=-1) != batch[1])


def train(
    params: Any, x: jax.Array, y: jax.Array, tx: Any, steps: int, batch_size: int, seed: int
) -> Any:
    """Trains in one compiled scan over random batches."""
    rows = np.random.default_rng(seed).integers(0, len(x), size=(steps, batch_size))
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, rows: jax.Array) -> Any:
        params, opt_state = carry
        grad_fn = flatopt.make_grad_fn(loss_fn, (x[rows], y[rows]))
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows)[0])
    params, opt_state = run((params, tx.init(params)), jnp.asarray(rows))
    return flatopt.eval_params(opt_state, params)
