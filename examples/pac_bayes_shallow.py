"""Bounds on the error of networks with one hidden layer (Biggs, Guedj, arXiv:2202.01627).

With an erf or a GELU activation the outputs of such a network are the mean outputs of a random one,
whose weights are Gaussian around its own, and which has a PAC-Bayes bound. The prior is trained on
one half of the digits, the bound is from the other half, which the prior has not seen.
`python -m examples.pac_bayes_shallow` prints the bound beside errors on digits that nothing saw.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import digits
from flatopt import measures

CLASSES = 10
SIGMAS = np.linspace(0.05, 0.2, 16)  # Fixed before any data are seen: the bound pays for each pair.
DELTA, SAMPLE_DELTA = 0.025, 0.01
Data = tuple[jax.Array, jax.Array]


class Network(NamedTuple):
    """The weights.

    Attributes:
      u: of the hidden layer, [width, inputs].
      v: of the output layer, [classes, width].
    """

    u: jax.Array
    v: jax.Array


class Twin(NamedTuple):
    """What makes the random network of an activation.

    Attributes:
      activation: the mean of a hidden unit, given u x with x of length 1, and beta.
      hidden: the random hidden unit, given two normal draws more, and sigma_1.
      precision: half the sum of the precisions of u, given beta and sigma_1: KL / |u - u_0|^2.
    """

    activation: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    precision: Callable[..., jax.typing.ArrayLike]


TWINS = {
    # sign(z + noise of deviation 1 / (sqrt(2) beta)).
    "erf": Twin(
        activation=lambda z, beta: jax.lax.erf(beta * z),
        hidden=lambda z, n1, _, beta, __: jnp.sign(z + n1 / (np.sqrt(2) * beta)),
        precision=lambda beta, _: beta**2,
    ),
    # One draw opens the unit, an independent one passes.
    "gelu": Twin(
        activation=lambda z, beta: z * jax.scipy.stats.norm.cdf(beta * z),
        hidden=lambda z, n1, n2, beta, s1: (z + n1 / beta > 0) * (z + s1 * n2),
        precision=lambda beta, s1: (beta**2 + s1**-2) / 2,
    ),
}


def normalise(x: jax.Array) -> jax.Array:
    """Inputs of length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def predict(twin: Twin, network: Network, x: jax.Array, beta: float) -> jax.Array:
    """The outputs, [examples, classes]: those of the random network in the mean."""
    return twin.activation(normalise(x) @ network.u.T, beta) @ network.v.T


def sample(
    twin: Twin,
    network: Network,
    x: jax.Array,
    beta: float,
    s1: jax.typing.ArrayLike,
    s2: jax.typing.ArrayLike,
    key: jax.Array,
) -> jax.Array:
    """Outputs of the random network, drawn anew for every example."""
    keys = jax.random.split(key, 3)
    z = normalise(x) @ network.u.T
    first, second = (jax.random.normal(k, z.shape, z.dtype) for k in keys[:2])
    hidden = twin.hidden(z, first, second, beta, s1)
    noise = jax.random.normal(keys[2], (*z.shape[:-1], len(network.v)), z.dtype)
    return hidden @ network.v.T + s2 * jnp.linalg.norm(hidden, axis=-1, keepdims=True) * noise


def complexity(
    twin: Twin,
    network: Network,
    prior: Network,
    beta: float,
    s1: jax.typing.ArrayLike,
    s2: jax.typing.ArrayLike,
) -> jax.Array:
    """The relative entropies of the two layers, [2]."""
    first = twin.precision(beta, s1) * jnp.sum((network.u - prior.u) ** 2)
    return jnp.stack([first, jnp.sum((network.v - prior.v) ** 2) / (2 * s2**2)])


def train(
    twin: Twin, network: Network, data: Data, beta: float, steps: int, rate: float, key: jax.Array
) -> Network:
    """Plain SGD on the cross-entropy of the deterministic network, batches of 64."""
    tx = optax.sgd(rate, momentum=0.9)

    def loss(network: Network, rows: jax.Array) -> jax.Array:
        logits = predict(twin, network, data[0][rows], beta)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1][rows]).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        network, state = carry
        rows = jax.random.randint(key, (64,), 0, len(data[1]))
        updates, state = tx.update(jax.grad(loss)(network, rows), state)
        return (optax.apply_updates(network, updates), state), None

    (network, _), _ = jax.lax.scan(step, (network, tx.init(network)), jax.random.split(key, steps))
    return network


class Result(NamedTuple):
    """The bound of one network, at its best sigmas.

    Attributes:
      bound: on the error of the random network; the majority of its draws errs twice as often at
        most.
      kl: relative entropy to the prior.
      error: of the random network, on the examples of the bound.
      sigmas: sigma_1 and sigma_2.
    """

    bound: jax.Array
    kl: jax.Array
    error: jax.Array
    sigmas: jax.Array


def bound(
    twin: Twin,
    network: Network,
    prior: Network,
    data: Data,
    beta: float,
    key: jax.Array,
    passes: int = 20,
) -> Result:
    """The best bound over the grid of sigmas, of which the failures are summed."""
    grid = jnp.stack(jnp.meshgrid(SIGMAS, SIGMAS, indexing="ij"), axis=-1).reshape(-1, 2)
    x, y = data
    draws = passes * len(y)  # Independent, since every example has draws of its own.

    def at(sigmas: jax.Array) -> Result:
        errors = [
            jnp.mean(
                jnp.argmax(sample(twin, network, x, beta, sigmas[0], sigmas[1], k), axis=1) != y
            )
            for k in jax.random.split(key, passes)
        ]
        error = jnp.mean(jnp.stack(errors))
        # A sum of independent coins, of one bias or of many, obeys Chernoff's bound.
        above = measures.kl_inverse(error, jnp.log(len(grid) / SAMPLE_DELTA) / draws)
        kl = jnp.sum(complexity(twin, network, prior, beta, sigmas[0], sigmas[1]))
        value = measures.seeger_bound(above, kl + jnp.log(len(grid)), len(y), DELTA)
        return Result(value, kl, error, sigmas)

    found = jax.lax.map(at, grid)
    return jax.tree.map(lambda leaf: leaf[jnp.argmin(found.bound)], found)


def run(name: str, settings: argparse.Namespace) -> dict[str, float]:
    """Trains prior and network, and compares the bound with errors on examples never used."""
    twin, beta = TWINS[name], settings.beta
    data = digits.load(train_size=1400, seed=settings.seed)
    train_data, test = ((x.reshape(len(x), -1), y) for x, y in data)
    x, y = train_data
    first, second = (x[:700], y[:700]), (x[700:], y[700:])  # For the prior, and for the bound.
    keys = jax.random.split(jax.random.key(settings.seed), 6)
    start = Network(
        0.1 * jax.random.normal(keys[0], (settings.width, 64)),
        0.1 * jax.random.normal(keys[1], (CLASSES, settings.width)),
    )
    prior = train(twin, start, first, beta, settings.steps, settings.rate, keys[2])
    network = train(
        twin, prior, train_data, beta, settings.steps // 10, settings.rate / 10, keys[3]
    )
    found = bound(twin, network, prior, second, beta, keys[4])

    outputs = jax.vmap(
        lambda k: sample(twin, network, test[0], beta, found.sigmas[0], found.sigmas[1], k)
    )(jax.random.split(keys[5], 200))
    votes = jnp.argmax(outputs, axis=-1)
    counts = jnp.sum(jax.nn.one_hot(votes, CLASSES), axis=0)
    mean = jnp.argmax(predict(twin, network, test[0], beta), axis=1)
    return {
        "bound": float(found.bound),
        "kl": float(found.kl),
        "error of the random network": float(jnp.mean(votes != test[1][None])),
        "error of its majority": float(jnp.mean(jnp.argmax(counts, axis=1) != test[1])),
        "error of the network": float(jnp.mean(mean != test[1])),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.pac_bayes_shallow")
    add = parser.add_argument
    add("--width", type=int, default=100, help="hidden units (100)")
    add("--beta", type=float, default=5.0, help="steepness of the activation (5)")
    add("--steps", type=int, default=3000, help="of the prior; a tenth follows on all data (3000)")
    add("--rate", type=float, default=0.05, help="learning rate of the prior (0.05)")
    add("--seed", type=int, default=0, help="of split, start and draws (0)")
    settings = parser.parse_args(argv)
    for name in TWINS:
        print(f"{name}: chance is {1 - 1 / CLASSES:.2f}")
        for what, value in run(name, settings).items():
            print(f"  {what}: {value:.3f}")


if __name__ == "__main__":
    main()
