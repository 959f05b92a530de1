"""The training loop: one compiled `lax.scan`, all seeds at once under `vmap`."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import flatopt
from benchmarks.compare import flatness
from benchmarks.compare.datasets import Array, Batches, Dataset, Split

MAX_CHUNKS = 20  # A run is cut into equal pieces of one compiled program, to show progress.
FLATNESS_IMAGES = 1000  # Flatness is that of the loss on the first so many training images.
LINE_POSITIONS = np.linspace(-1.0, 1.0, 25, dtype=np.float32)
LINE_DIRECTIONS = 8


class Carry(NamedTuple):
    """What training hands from step to step."""

    params: Any
    opt_state: optax.OptState


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      params: the weights to evaluate, one set a seed.
      seconds: time of the training steps of all seeds together, without compilation.
      compile_seconds: time to trace and compile them.
    """

    params: Any
    seconds: float
    compile_seconds: float


class Scores(NamedTuple):
    """What is measured at the end of a run; the leading axis is the seed.

    Attributes:
      accuracy: share of test images classified rightly.
      train_loss: mean loss over the training images.
      top_eigenvalue: largest Hessian eigenvalue of the training loss.
      trace: of that Hessian.
      local_energy: rise of the training error under noise on the weights.
      barrier: rise of the training loss between the networks of two seeds.
      line: training loss at `LINE_POSITIONS` along random directions.
    """

    accuracy: Array
    train_loss: Array
    top_eigenvalue: Array
    trace: Array
    local_energy: Array
    barrier: Array
    line: Array


class Task:
    """A model and its data, on the device; every method is trained and judged on the same one."""

    def __init__(self, model: nn.Module, dataset: Dataset, split: Split, seeds: list[int]):
        """Moves the data to the device, as bytes: they become inputs batch by batch."""
        self.model = model
        self.shift, self.scale = dataset.shift, dataset.scale
        self.images = jnp.asarray(dataset.images)
        self.labels = jnp.asarray(dataset.labels)
        self.split: Split = jax.tree.map(jnp.asarray, split)
        self.keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        # One set a seed: every method starts from the same ones.
        self.initial_params = jax.jit(jax.vmap(self._init))(self.keys)
        # Compiled once: every method has parameters of the same shapes.
        self._score = jax.jit(self._score_all)

    def inputs(self, images: jax.Array) -> jax.Array:
        """Pixels, shifted and scaled as the data set says."""
        return (images.astype(jnp.float32) - self.shift) / self.scale

    def loss(self, params: Any, x: jax.Array, labels: Array) -> jax.Array:
        """Mean cross-entropy."""
        logits = self.logits(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        """What the network says of inputs `x`."""
        return cast(jax.Array, self.model.apply(params, x))

    def _init(self, key: jax.Array) -> Any:
        return self.model.init(key, jnp.zeros((1, self.images.shape[1])))

    def score(self, params: Any) -> Scores:
        """Test accuracy and flatness of each seed."""
        return self._score(params, self.keys, self.images, self.labels, self.split)

    def first_seed(self) -> tuple[Array, Array]:
        """Images and labels on which the first seed's flatness is measured, as one batch."""
        rows = self.split.train_rows[0][:FLATNESS_IMAGES]
        return self.inputs(self.images[rows])[None], self.split.train_labels[0][None, : len(rows)]

    def loss_on(self, params: Any, batch: tuple[jax.Array, Array]) -> jax.Array:
        """The loss, as the measures call it."""
        return self.loss(params, *batch)

    def _score_all(
        self, params: Any, keys: jax.Array, images: jax.Array, labels: jax.Array, split: Split
    ) -> Scores:
        # The next seed's network; with one seed there is none.
        others = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), params)
        several = len(keys) > 1

        def one_seed(arguments: tuple[Any, Any, jax.Array, Split]) -> Scores:
            params, other, key, own = arguments
            logits = self.logits(params, self.inputs(images[own.test_rows]))
            correct = jnp.argmax(logits, axis=-1) == labels[own.test_rows]
            x = self.inputs(images[own.train_rows])
            near = slice(0, FLATNESS_IMAGES)

            def loss(params: Any) -> jax.Array:
                return self.loss(params, x[near], own.train_labels[near])

            def error(params: Any) -> jax.Array:
                logits = self.logits(params, x[near])
                return jnp.mean(jnp.argmax(logits, axis=-1) != own.train_labels[near])

            measured = flatness.measure(
                loss, error, params, other if several else None, jax.random.fold_in(key, 1)
            )
            return Scores(
                accuracy=jnp.mean(correct),
                train_loss=self.loss(params, x, own.train_labels),
                **measured._asdict(),
                line=flatness.loss_along_lines(
                    loss,
                    params,
                    jax.random.fold_in(key, 2),
                    jnp.asarray(LINE_POSITIONS),
                    LINE_DIRECTIONS,
                ),
            )

        # One seed after another: a seed's test images at a time fit into memory.
        return jax.lax.map(one_seed, (params, others, keys, split))


def step(
    tx: optax.GradientTransformationExtraArgs,
    grad_fn: "flatopt.GradFn | _CountedGradient",
    carry: Carry,
    extra_grad_fn: Callable[..., Any] | None = None,
) -> Carry:
    """One update. `grad_fn` is the only way to the loss, so counting its calls counts gradients.

    With `extra_grad_fn` the gradients that the optimiser asks for come from there.
    """
    params, opt_state = carry
    loss, grads = grad_fn.value_and_grad(params)
    updates, opt_state = tx.update(
        grads, opt_state, params, value=loss, grad_fn=extra_grad_fn or grad_fn
    )
    return Carry(optax.apply_updates(params, updates), opt_state)


def train(
    task: Task,
    tx: optax.GradientTransformation,
    batches: Batches,
    on_progress: Callable[[int], object] | None = None,
    fresh_batches: bool = False,
    pieces: int = MAX_CHUNKS,
    on_piece: Callable[[Any], object] | None = None,
) -> Trained:
    """Trains one network a seed.

    Args:
      task: the model and the data.
      tx: any optax optimiser.
      batches: what to train on, step by step.
      on_progress: called now and then with the number of steps done since the last call.
      fresh_batches: whether the optimiser's extra gradients are taken on batches of their own,
        drawn with replacement from the seed's training images, instead of on the step's batch.
      pieces: the run is cut into so many equal pieces of one program, or fewer.
      on_piece: called with the weights to evaluate after each piece.
    """
    tx = optax.with_extra_args_support(tx)

    def run(
        carry: Carry, images: jax.Array, batches: Batches, numbers: jax.Array, split: Split
    ) -> Carry:
        def step_of_seed(
            carry: Carry, batch: Batches, own: Split, key: jax.Array, number: jax.Array
        ) -> Carry:
            def grad_fn(rows: Array, labels: Array) -> flatopt.GradFn:
                return flatopt.make_grad_fn(task.loss, task.inputs(images[rows]), labels)

            def extra_grad_fn(params: Any, i: jax.typing.ArrayLike) -> Any:
                draw = jax.random.fold_in(jax.random.fold_in(key, number), i)
                places = jax.random.randint(draw, batch.rows.shape, 0, len(own.train_rows))
                return grad_fn(own.train_rows[places], own.train_labels[places])(params)

            extra = extra_grad_fn if fresh_batches else None
            return step(tx, grad_fn(batch.rows, batch.labels), carry, extra)

        def step_of_all(carry: Carry, scanned: tuple[Batches, jax.Array]) -> tuple[Carry, None]:
            batch, number = scanned
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 3))(task.keys)
            mapped = jax.vmap(step_of_seed, in_axes=(0, 0, 0, 0, None))
            return mapped(carry, batch, split, keys, number), None

        return jax.lax.scan(step_of_all, carry, (batches, numbers))[0]

    params = task.initial_params
    carry = Carry(params, jax.jit(jax.vmap(tx.init))(params))
    steps = len(batches.rows)
    size = _chunk_size(steps, pieces)
    chunks = [
        Batches(jnp.asarray(batches.rows[i : i + size]), jnp.asarray(batches.labels[i : i + size]))
        for i in range(0, steps, size)
    ]

    evaluate = jax.jit(jax.vmap(flatopt.eval_params))
    numbers = jnp.arange(steps).reshape(-1, size)

    began = time.perf_counter()
    compiled = jax.jit(run).lower(carry, task.images, chunks[0], numbers[0], task.split).compile()
    compile_seconds = time.perf_counter() - began

    jax.block_until_ready((carry, chunks))
    began = time.perf_counter()
    for chunk, own_numbers in zip(chunks, numbers, strict=True):
        carry = jax.block_until_ready(compiled(carry, task.images, chunk, own_numbers, task.split))
        if on_progress is not None:
            on_progress(size)
        if on_piece is not None:
            on_piece(evaluate(carry.opt_state, carry.params))
    seconds = time.perf_counter() - began

    params = evaluate(carry.opt_state, carry.params)
    return Trained(params, seconds, compile_seconds)


def _chunk_size(steps: int, most: int) -> int:
    """The length of the pieces: the largest number of equal ones up to `most`."""
    return steps // max(n for n in range(1, most + 1) if steps % n == 0)


def count_gradients(tx: optax.GradientTransformation, steps: int) -> int:
    """Counts the gradient evaluations of a whole run of `steps` updates.

    The same `step` runs on a tiny problem with a gradient that calls back each time it is
    evaluated, so that branches not taken do not count. A product with the Hessian counts as one.
    """
    tx = optax.with_extra_args_support(tx)
    grad_fn = _CountedGradient()

    def one(carry: Carry, _: None) -> tuple[Carry, None]:
        return step(tx, grad_fn, carry), None

    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    carry = Carry(params, tx.init(params))
    jax.block_until_ready(jax.jit(lambda c: jax.lax.scan(one, c, length=steps)[0])(carry))
    jax.effects_barrier()
    return next(grad_fn.counter)


class _CountedGradient:
    """The gradient of a tiny problem, which counts how often it is evaluated, and its value."""

    def __init__(self) -> None:
        self.counter = itertools.count()

    def __call__(self, params: Any, i: jax.typing.ArrayLike) -> Any:
        del i
        # With a parameter as argument, mapped over replicas it is called once for each.
        jax.debug.callback(self._count, params["bias"])
        return params

    def value_and_grad(self, params: Any) -> tuple[jax.Array, Any]:
        """The clean pass."""
        return self.value(params), self(params, 0)

    def value(self, params: Any) -> jax.Array:
        """Forward passes alone do not count."""
        return optax.tree.norm(params)

    def _count(self, _: Any) -> None:
        next(self.counter)
