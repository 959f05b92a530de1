"""One small network, its data and its dense Hessian, for the tests of the measures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

D, H, C, N, B = 4, 6, 3, 3, 8  # 51 parameters; 3 batches of 8.
SIZE = D * H + H + H * C + C


def params(seed: int = 0, dtype: Any = jnp.float64) -> Any:
    rng = np.random.default_rng(seed)

    def layer(m: int, n: int) -> dict[str, jax.Array]:
        kernel = rng.normal(size=(m, n)) / np.sqrt(m)
        return {
            "bias": jnp.asarray(0.1 * rng.normal(size=n), dtype),
            "kernel": jnp.asarray(kernel, dtype),
        }

    return {"first": layer(D, H), "second": layer(H, C)}


def batches(
    seed: int = 1, dtype: Any = jnp.float64, number: int = N
) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, B, D))
    return jnp.asarray(x, dtype), jnp.asarray(rng.integers(0, C, size=(number, B)))


def model_fn(p: Any, batch: Any) -> jax.Array:
    x = jnp.tanh(batch[0] @ p["first"]["kernel"] + p["first"]["bias"][None])
    return x @ p["second"]["kernel"] + p["second"]["bias"][None]


def loss_fn(p: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model_fn(p, batch), batch[1]).mean()


def squared_loss_fn(p: Any, batch: Any) -> jax.Array:
    wanted = jax.nn.one_hot(batch[1], C, dtype=batch[0].dtype)
    return 0.5 * jnp.mean(jnp.sum((model_fn(p, batch) - wanted) ** 2, axis=-1))


def error_fn(p: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.argmax(model_fn(p, batch), axis=-1) != batch[1], dtype=batch[0].dtype)


def flat_data(data: Any) -> Any:
    """The stacked batches as a single one."""
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), data)


def dense_hessian(loss: Any, p: Any, data: Any) -> np.ndarray:
    flat, unravel = ravel_pytree(p)
    whole = flat_data(data)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w), whole)))(flat))


def dense_gauss_newton(p: Any, data: Any, kind: str) -> np.ndarray:
    """The sum over examples of J^T A J, by hand."""
    flat, unravel = ravel_pytree(p)
    whole = flat_data(data)
    jacobian = np.asarray(jax.jacobian(lambda w: model_fn(unravel(w), whole))(flat))
    outputs = np.asarray(model_fn(p, whole))
    total = np.zeros((flat.size, flat.size))
    for j, f in zip(jacobian, outputs, strict=True):
        q = np.exp(f - f.max()) / np.exp(f - f.max()).sum()
        inner = np.diag(q) - np.outer(q, q) if kind == "softmax_cross_entropy" else np.eye(C)
        total += j.T @ inner @ j
    return total / len(outputs)


def quadratic(eigenvalues: Any, seed: int = 0) -> tuple[Any, np.ndarray, Any]:
    """`(loss_fn, matrix, params)`: a quadratic over two leaves with its minimum at zero."""
    rng = np.random.default_rng(seed)
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    matrix = basis @ np.diag(eigenvalues) @ basis.T
    matrix = (matrix + matrix.T) / 2

    def loss(p: Any) -> jax.Array:
        w = jnp.concatenate([p["a"], p["b"]])
        return 0.5 * w @ jnp.asarray(matrix, w.dtype) @ w

    return loss, matrix, {"a": np.zeros(n // 3), "b": np.zeros(n - n // 3)}
