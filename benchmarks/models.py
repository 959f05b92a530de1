"""The networks that the benchmarks train: an MLP, a CNN, a Transformer and a wide residual network.

Each is plain JAX on a tree of arrays, so that a PyTorch process can build the same network from the
same weights. Convolutions are XLA's; pooling is a maximum over a reshaped image, which on a CPU is
five times faster with its gradient than `flax.linen.max_pool`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.models.wide_resnet import WideResNet

CLASSES = 10
HEAD_WIDTH = 32


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      name: of the model.
      params: float32 weights.
      loss_fn: the loss, `loss_fn(params, *batch)`.
      batch: inputs and labels.
      sizes: what the model was built with, for the results file.
    """

    name: str
    params: Any
    loss_fn: Callable[..., jax.Array]
    batch: tuple[jax.Array, jax.Array]
    sizes: dict[str, Any]


def mlp(
    widths: tuple[int, ...] = (3072, 1024, 1024, 1024, 1024, CLASSES),
    batch_size: int = 64,
    dtype: str = "float32",
) -> Problem:
    """Dense layers with ReLU between them."""
    rng = np.random.default_rng(0)
    params = [_dense(rng, m, n) for m, n in itertools.pairwise(widths)]
    sizes = {"widths": widths, "batch_size": batch_size, "dtype": dtype}
    return _problem("mlp", params, _mlp_logits, (batch_size, widths[0]), sizes)


def cnn(
    channels: tuple[int, ...] = (32, 64, 128),
    image: int = 32,
    batch_size: int = 64,
    dtype: str = "float32",
    plain: bool = False,
) -> Problem:
    """Blocks of 3x3 convolution, ReLU and 2x2 maximum, then a mean and a dense layer.

    `plain`: with the gradient that JAX derives for a convolution; see `_convolve`.
    """
    rng = np.random.default_rng(0)
    params = {
        "convolutions": [
            {"kernel": _normal(rng, (3, 3, m, n), 9 * m), "bias": jnp.zeros(n)}
            for m, n in itertools.pairwise((3, *channels))
        ],
        "head": _dense(rng, channels[-1], CLASSES),
    }
    sizes = {"channels": channels, "image": image, "batch_size": batch_size, "dtype": dtype}
    logits = functools.partial(_cnn_logits, _plain_convolve if plain else _convolve)
    shape = (batch_size, image, image, 3)
    return _problem("cnn", params, logits, shape, sizes | {"plain": plain})


def transformer(
    width: int = 128,
    layers: int = 4,
    length: int = 64,
    features: int = 48,
    batch_size: int = 8,
    dtype: str = "float32",
) -> Problem:
    """Pre-LayerNorm blocks over `length` patches of `features` numbers, then a mean and a layer."""
    rng = np.random.default_rng(0)
    params = {
        "embed": _dense(rng, features, width),
        "positions": _normal(rng, (length, width), 2500),
        "blocks": [
            {
                "norm1": _norm(width),
                "attention": _dense(rng, width, 3 * width),
                "out": _dense(rng, width, width),
                "norm2": _norm(width),
                "expand": _dense(rng, width, 4 * width),
                "contract": _dense(rng, 4 * width, width),
            }
            for _ in range(layers)
        ],
        "norm": _norm(width),
        "head": _dense(rng, width, CLASSES),
    }
    sizes = {"width": width, "layers": layers, "length": length, "features": features}
    sizes |= {"heads": max(1, width // HEAD_WIDTH), "batch_size": batch_size}
    shape = (batch_size, length, features)
    return _problem("transformer", params, _transformer_logits, shape, sizes | {"dtype": dtype})


def wide_resnet(
    depth: int = 16, width: int = 4, image: int = 32, batch_size: int = 128, dtype: str = "float32"
) -> Problem:
    """WRN-depth-width with BatchNorm on the batch's statistics; meant for a GPU."""
    model = WideResNet(depth, width, CLASSES, dtype=jnp.dtype(dtype))
    variables = model.init(jax.random.key(0), jnp.zeros((1, image, image, 3)))
    statistics = variables["batch_stats"]

    def logits(params: Any, x: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    sizes = {"depth": depth, "width": width, "image": image, "batch_size": batch_size}
    shape = (batch_size, image, image, 3)
    return _problem("wide_resnet", variables["params"], logits, shape, sizes | {"dtype": dtype})


MODELS: dict[str, Callable[..., Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn_plain": functools.partial(cnn, plain=True),
    "transformer": transformer,
    "wide_resnet": wide_resnet,
}


def default_models() -> list[str]:
    """The three small ones; where a GPU is at hand the wide residual network too."""
    names = ["mlp", "cnn", "transformer"]
    return [*names, "wide_resnet"] if jax.default_backend() == "gpu" else names


def num_params(problem: Problem) -> int:
    """Number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(problem.params))


def _problem(
    name: str, params: Any, logits_fn: Any, shape: tuple[int, ...], sizes: dict[str, Any]
) -> Problem:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, size=shape[0]), jnp.int32)
    dtype = jnp.dtype(sizes["dtype"])

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        # Weights stay float32; what is computed with them is in `dtype`.
        if dtype != jnp.float32:
            params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
        logits = logits_fn(params, x).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return Problem(name, params, loss_fn, (x, y), sizes)


def _apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _mlp_logits(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(_apply(layer, x))
    return _apply(params[-1], x)


def _plain_convolve(x: jax.Array, kernel: jax.Array, padding: Any = "SAME") -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution whose gradients are convolutions of channels-last images too.

    XLA's CPU backend has fast kernels for that layout only. It rearranges other layouts, among them
    those of a convolution's derived gradients, in the main program, but not in branches and loops,
    where they run tens of times slower: https://github.com/jax-ml/jax/issues/12868.
    """
    return _plain_convolve(x, kernel)


def _convolve_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
    x, kernel = saved
    to_x = _plain_convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    # Channels as examples, examples as channels: the window is the image.
    pad = kernel.shape[0] // 2
    to_kernel = _plain_convolve(
        x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), [(pad, pad), (pad, pad)]
    )
    return to_x, to_kernel.transpose(1, 2, 0, 3)


_convolve.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _convolve_backward)


def _cnn_logits(convolve: Any, params: dict[str, Any], x: jax.Array) -> jax.Array:
    for layer in params["convolutions"]:
        x = jax.nn.relu(convolve(x, layer["kernel"]) + layer["bias"])
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return _apply(params["head"], jnp.mean(x, (1, 2)))


def _transformer_logits(params: dict[str, Any], x: jax.Array) -> jax.Array:
    x = _apply(params["embed"], x) + params["positions"]
    for block in params["blocks"]:
        y = _apply(block["attention"], _normalise(block["norm1"], x))
        q, k, v = (
            part.reshape(*part.shape[:2], -1, min(HEAD_WIDTH, part.shape[-1]))
            for part in jnp.split(y, 3, axis=-1)
        )
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + _apply(block["out"], y.reshape(x.shape))
        y = jax.nn.gelu(_apply(block["expand"], _normalise(block["norm2"], x)), approximate=False)
        x = x + _apply(block["contract"], y)
    return _apply(params["head"], jnp.mean(_normalise(params["norm"], x), 1))


def _normalise(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) * (2 / inputs) ** 0.5, jnp.float32)


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"kernel": _normal(rng, (inputs, outputs), inputs), "bias": jnp.zeros(outputs)}


def _norm(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
