"""Every public factory of flatopt as a test case, and one small problem to run them all on."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt

LEARNING_RATE = 0.05


def sgd() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=0.9)


def _complete(kind: str, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A whole optimiser from one factory's result."""
    match kind:
        case "perturbation":
            return optax.chain(flatopt.gradient_at(tx), sgd())
        case "direction":
            return optax.chain(
                flatopt.gradient_at(optax.chain(tx, flatopt.scale_to_norm(0.05))), sgd()
            )
        case "combiner":
            return optax.chain(flatopt.gradient_at(flatopt.scale_to_norm(0.05), combiner=tx), sgd())
        case "stage":
            return optax.chain(tx, sgd())
        case "average":
            return optax.chain(sgd(), tx)
        case "wrapper":
            return tx
    raise ValueError(kind)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of calling one public factory.

    Attributes:
      factory: its public name.
      kind: perturbation, direction, combiner, stage, average or wrapper: how it becomes a whole
        optimiser.
      kwargs: arguments of the factory.
      hyperparameter: an argument that may be a schedule or a traced array, or None.
      off: a value of `hyperparameter` at which the method is its base optimiser, or None.
      extra_evaluations: calls of `grad_fn` in ten steps.
      copies: parameter-sized copies in the state, over that of the base optimiser.
      variant: tells several cases of one factory apart.
    """

    factory: str
    kind: str
    kwargs: Mapping[str, Any]
    hyperparameter: str | None = None
    off: float | None = None
    extra_evaluations: int = 0
    copies: float = 0
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.factory}-{self.variant}" if self.variant else self.factory

    @property
    def needs_grad_fn(self) -> bool:
        return self.extra_evaluations > 0

    def build(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        factory = getattr(flatopt, self.factory)
        return _complete(self.kind, factory(**{**self.kwargs, **overrides}))

    def build_injected(self) -> optax.GradientTransformationExtraArgs:
        static = [name for name, value in self.kwargs.items() if isinstance(value, int)]
        factory = optax.inject_hyperparams(getattr(flatopt, self.factory), static_args=static)
        return _complete(self.kind, factory(**self.kwargs))


def _mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


# fmt: off
CASES = [
    # perturbations
    Case("scale_to_norm", "perturbation", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_adaptive_norm", "perturbation", {"rho": 0.5, "eta": 0.01}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_adaptive_norm", "perturbation", {"rho": 0.5, "mask": _mask}, extra_evaluations=10, variant="mask"),
    Case("mask_displacement", "direction", {"mask": _mask}, extra_evaluations=10),
    # stages
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05)}, extra_evaluations=10),
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05), "num_steps": 3}, extra_evaluations=30, variant="num_steps"),
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05), "start": 4, "every": 3}, extra_evaluations=2, variant="start_every"),
    Case("sam", "stage", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("sam", "stage", {"rho": 0.05, "every": 5}, "rho", 0.0, extra_evaluations=2, variant="every"),
    Case("sam", "stage", {"rho": 0.05, "start": 7}, "rho", 0.0, extra_evaluations=3, variant="start"),
    Case("asam", "stage", {"rho": 0.5}, "rho", 0.0, extra_evaluations=10),
    # wrappers
    Case("hold_perturbed", "wrapper", {"optimizer": sgd(), "perturbation": flatopt.scale_to_norm(0.05)}, copies=1),
    Case("msam", "wrapper", {"optimizer": sgd(), "rho": 0.1}, "rho", 0.0),
    Case("msam", "wrapper", {"optimizer": sgd(), "rho": -0.1}, "rho", 0.0, variant="ascent"),
    Case("msam", "wrapper", {"optimizer": optax.adamw(0.05), "rho": 0.1}, "rho", 0.0, variant="adamw"),
    # averaging
    Case("swa", "average", {}, copies=1),
    Case("swa", "average", {"start": 3, "every": 2}, copies=1, variant="start_every"),
    Case("params_ema", "average", {"decay": 0.9}, "decay", copies=1),
    Case("params_ema", "average", {"decay": 0.99, "debias": False, "warmup_steps": 10}, "decay", copies=1, variant="warmup"),
    # monitoring
    Case("record_gradient_norm", "stage", {}),
    Case("record_sharpness", "combiner", {"perturbation": flatopt.scale_to_norm(0.05)}, extra_evaluations=10),
    Case("record_distance", "average", {"average": flatopt.swa()}, copies=1),
    Case("record_cosine", "wrapper", {"optimizer": sgd()}),
    # recipes
    Case("wasam", "wrapper", {"optimizer": sgd(), "rho": 0.05, "start": 3}, "rho", extra_evaluations=10, copies=1),
]
# fmt: on


def cases(**conditions: Callable[[Case], bool]) -> list[Any]:
    """The cases that meet every condition, as pytest parameters named after them."""
    chosen = [c for c in CASES if all(condition(c) for condition in conditions.values())]
    return [pytest.param(c, id=c.name) for c in chosen]


def public_factories() -> Iterator[str]:
    """Names of the public functions that return a transformation."""
    for name, value in vars(flatopt).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            returns = inspect.signature(value).return_annotation
            if returns in (optax.GradientTransformation, optax.GradientTransformationExtraArgs):
                yield name


def init_params(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "hidden": {"kernel": normal(4, 8) * 0.5, "bias": normal(8) * 0.1},
        "out": {"kernel": normal(8, 2) * 0.5, "bias": normal(2) * 0.1},
        "temperature": jnp.ones([], dtype),
    }


def make_batch(seed: int = 0, size: int = 8, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    rng = np.random.default_rng(100 + seed)
    x = rng.normal(size=(size, 4))
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], axis=1)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def loss_fn(params: dict[str, Any], batch: tuple[Any, Any]) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return jnp.mean(jnp.square(out * params["temperature"] - y))


def train_step(
    tx: optax.GradientTransformationExtraArgs, loss: Callable[..., Any] = loss_fn, **extra_args: Any
) -> Callable[..., tuple[Any, Any]]:
    """The training step that README shows, as a function of `(params, opt_state, batch)`."""

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, batch)
        grad_fn = flatopt.make_grad_fn(loss, batch)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    return step


def run(
    tx: optax.GradientTransformationExtraArgs,
    params: Any = None,
    steps: int = 6,
    transform: Callable[..., Any] = jax.jit,
    opt_state: Any = None,
    first: int = 0,
) -> tuple[Any, Any]:
    """Trains on batches `first`, `first + 1`, ... and returns the parameters and the state."""
    params = init_params() if params is None else params
    opt_state = tx.init(params) if opt_state is None else opt_state
    step = transform(train_step(tx))
    for i in range(first, first + steps):
        params, opt_state = step(params, opt_state, make_batch(i))
    return params, opt_state


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal structure, dtypes and bits (the sign of zero aside)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(e)
        np.testing.assert_array_equal(_numpy(a), _numpy(e))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal structure and close values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(_numpy(a), _numpy(e), rtol=rtol, atol=atol)


def _numpy(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
