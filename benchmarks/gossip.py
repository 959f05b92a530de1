"""Gossip against one network on the whole large batch, and the distance of replicas as noise.

`python -m benchmarks.gossip --json benchmarks/results/gossip.json`. Equal gradients: in each step
either one network takes the gradient of 512 images, or 8 replicas on a ring take those of 64 each.
The second part starts two networks at one point and gives them other batches: how far apart they
end, over the size of the batch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from benchmarks import record
from benchmarks.compare.report import Estimate
from examples import digits

RATES = (0.1, 0.3, 0.7, 1.0, 1.2, 1.4, 2.0)
SIZES = (8, 16, 32, 64, 128, 256)
REPLICAS, TOGETHER, WIDTH = 8, 512, 64
DISTANCE_RATE = 0.1
LEARNT = 0.9  # Test accuracy; a tenth is chance.

Params = dict[str, jax.Array]


def start(key: jax.Array) -> Params:
    """He's initial weights of a network with two hidden layers."""
    keys, shapes = jax.random.split(key, 3), ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10))
    draw = lambda key, shape: jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5  # noqa: E731
    return {name: draw(key, s) for name, key, s in zip("abc", keys, shapes, strict=True)}


def logits(params: Params, x: jax.Array) -> jax.Array:
    """The network."""
    return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]


def loss(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels))


def train(
    tx: Any, params: Params, key: jax.Array, train_set: Any, shape: tuple[int, ...], steps: int
) -> Params:
    """Trains replicas on the leading axis; `shape` is that of the rows drawn for a step."""
    x, labels = train_set

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        rows = jax.random.randint(key, shape, 0, len(x))
        grads = jax.vmap(jax.grad(loss))(params, x[rows], labels[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def apart(params: Params) -> jax.Array:
    """Root mean square distance of replicas to their centre, over the centre's length."""
    centre = flatopt.barycentre(params)
    distance = optax.tree.norm(jax.tree.map(lambda w, c: w - c, params, centre))
    number = len(jax.tree.leaves(params)[0])
    return distance / number**0.5 / optax.tree.norm(centre)


def contest(rate: jax.Array, key: jax.Array, data: digits.Digits, steps: int) -> jax.Array:
    """[2 ways, 3]: training loss, test accuracy of the centre, distance of its replicas."""
    begin, rows = jax.random.split(key)
    params = start(begin)

    def measured(replicas: Params) -> jax.Array:
        centre, (x, labels) = flatopt.barycentre(replicas), data.test
        right = jnp.mean(jnp.argmax(logits(centre, x), axis=-1) == labels)
        return jnp.stack([loss(centre, *data.train), right, apart(replicas)])

    ways = (
        (optax.sgd(rate), 1),
        (flatopt.gossip(optax.sgd(rate), "ring"), REPLICAS),
    )
    trained = [
        train(tx, flatopt.replicate_params(params, n), rows, data.train, (n, TOGETHER // n), steps)
        for tx, n in ways
    ]
    return jnp.stack([measured(replicas) for replicas in trained])


def noise(size: int, key: jax.Array, data: digits.Digits, steps: int) -> jax.Array:
    """How far apart two networks from one start end, whose batches differ."""
    begin, rows = jax.random.split(key)
    replicas = flatopt.replicate_params(start(begin), 2)
    tx = optax.sgd(DISTANCE_RATE)
    return apart(train(tx, replicas, rows, data.train, (2, size), steps))


def measure(seeds: int, steps: int) -> dict[str, Any]:
    """All rates and seeds as one compiled program, and one for each batch size."""
    flat = jax.tree.map(lambda a: a.reshape(len(a), -1) if a.ndim > 1 else a, digits.load())
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    over = jax.jit(
        jax.vmap(jax.vmap(lambda r, k: contest(r, k, flat, steps), (None, 0)), (0, None))
    )
    found = np.asarray(over(jnp.array(RATES), keys), float)  # [rates, seeds, ways, 3]
    found = np.where(np.isfinite(found).all(-1, keepdims=True), found, np.nan)
    rows = []
    for rate, cell in zip(RATES, found, strict=True):
        ways = {
            name: dict(zip(("loss", "accuracy", "distance"), _listed(cell[:, way].T), strict=True))
            for way, name in enumerate(("large batch", "gossip"))
        }
        rows.append({"rate": rate, **ways})
    distances = {
        str(size): _listed(jax.jit(jax.vmap(lambda k, s=size: noise(s, k, flat, steps)))(keys))
        for size in SIZES
    }
    return {"seeds": list(range(seeds)), "steps": steps, "rows": rows, "distance": distances}


def _listed(values: Any) -> Any:
    found = np.asarray(values, float).round(6).astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def learned(accuracy: np.ndarray) -> int:
    """How many seeds end above `LEARNT`; a run that is not finite does not."""
    return int((accuracy > LEARNT).sum())


def lines(results: dict[str, Any]) -> list[str]:
    """Two tables as Markdown: means over seeds, with standard errors."""
    text = [
        "| learning rate | large batch: test accuracy, % | gossip: test accuracy, % "
        "| gossip minus large batch, points | seeds that learn, large batch | gossip "
        "| distance of replicas |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        big, ring = (
            {name: np.array(values, float) for name, values in row[way].items()}
            for way in ("large batch", "gossip")
        )
        shown = [
            _show(100 * big["accuracy"], 1), _show(100 * ring["accuracy"], 1),
            _show(100 * (ring["accuracy"] - big["accuracy"]), 1), learned(big["accuracy"]),
            learned(ring["accuracy"]), _show(ring["distance"], 4),
        ]  # fmt: skip
        text.append(f"| {row['rate']:g} | {' | '.join(map(str, shown))} |")
    text += [
        "",
        "| images in a batch | distance of two networks from one start, over their length |",
        "| ---: | ---: |",
    ]
    for size, values in results["distance"].items():
        text.append(f"| {size} | {_show(np.array(values, float), 4)} |")
    return text


def _show(values: np.ndarray, digits: int) -> str:
    """Mean and standard error; a run that is not finite is none."""
    return Estimate.of(values).show(digits) if np.isfinite(values).all() else "diverged"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gossip", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (8)")
    parser.add_argument("--steps", type=int, default=300, help="updates (300)")
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args(argv)
    results = measure(settings.seeds, settings.steps)
    record.write(settings.json, results)
    print("\n".join(lines(results)))
    return 0


if __name__ == "__main__":
    main()
