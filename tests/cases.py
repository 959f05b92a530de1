"""Every public factory of flatopt as a test case, and one small problem to run them all on."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from flatopt._core import layers

LEARNING_RATE = 0.05


def sgd() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=0.9)


Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


def complete(
    kind: str, tx: optax.GradientTransformation, base: Callable[[], Any] = sgd
) -> Optimizer:
    """A whole optimiser from one factory's result and the optimiser that `base` makes."""
    match kind:
        case "perturbation":
            return optax.chain(flatopt.gradient_at(tx), base())
        case "direction":
            return optax.chain(
                flatopt.gradient_at(optax.chain(tx, flatopt.scale_to_norm(0.05))), base()
            )
        case "combiner":
            perturbation = flatopt.scale_to_norm(0.05)
            return optax.chain(flatopt.gradient_at(perturbation, combiner=tx), base())
        case "stage":
            return optax.chain(tx, base())
        case "preconditioner":
            return optax.chain(with_statistics(tx), base())
        case "average":
            return optax.chain(base(), tx)
        case "wrapper":
            return tx
    raise ValueError(kind)


def statistics_by_hand(params: Any, bases: Any = None) -> dict[str, flatopt.LayerStatistics]:
    """Statistics that are no model's: of layers of any tree, from their own numbers."""
    leaves, found = jax.tree.leaves(params), {}
    diagonal = lambda n: jnp.diag(jnp.linspace(1.0, 1.0 + 0.5 * n, n))  # noqa: E731 (no eigenvalue is twice)
    for name, layer in layers.find_layers(params).items():
        matrix = jnp.cos(layers.join(layer, leaves))
        a = matrix @ matrix.T / layer.outputs + diagonal(layer.rows)
        g = matrix.T @ matrix / layer.rows + diagonal(layer.outputs)
        scales = None
        if bases is not None:
            diagonals = [
                jnp.diagonal(q.T @ x @ q) for q, x in zip(bases[name], (a, g), strict=True)
            ]
            scales = jnp.outer(*diagonals)
        found[name] = flatopt.LayerStatistics(a, g, scales)
    return found


def with_statistics(tx: optax.GradientTransformation) -> Optimizer:
    """`tx`, given the statistics by hand where a test gives none."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        extra_args.setdefault("stats_fn", statistics_by_hand)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A row of the benchmarks of step time and memory.

    Attributes:
      group: title of the rows that take turns with one base.
      label: name of the row; empty is that of the factory.
      kwargs: what differs from the arguments of the case.
    """

    group: str
    label: str = ""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of calling one public factory.

    Attributes:
      factory: its public name.
      kind: perturbation, direction, combiner, stage, preconditioner (a stage that needs statistics),
        average or wrapper: how it becomes a whole optimiser.
      kwargs: arguments of the factory.
      hyperparameter: an argument that may be a schedule or a traced array, or None.
      off: a value of `hyperparameter` at which the method is its base optimiser, or None.
      extra_evaluations: calls of `grad_fn` in ten steps.
      needs_value: whether `update` needs `value=`, the loss.
      copies: parameter-sized copies in the state, over that of the base optimiser; by bytes, and
        for a kernel of 100 x 100.
      variant: tells several cases of one factory apart.
      bench: its row in the benchmarks, or None.
    """

    factory: str
    kind: str
    kwargs: Mapping[str, Any]
    hyperparameter: str | None = None
    off: float | None = None
    extra_evaluations: int = 0
    copies: float = 0
    needs_value: bool = False
    variant: str = ""
    bench: Bench | None = None

    @property
    def name(self) -> str:
        return f"{self.factory}-{self.variant}" if self.variant else self.factory

    @property
    def needs_grad_fn(self) -> bool:
        return self.extra_evaluations > 0

    def build(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        if not overrides:
            return self._built
        factory = getattr(flatopt, self.factory)
        return complete(self.kind, factory(**{**self.kwargs, **overrides}))

    @functools.cached_property
    def _built(self) -> optax.GradientTransformationExtraArgs:
        """One object for all tests: `run` compiles its step once."""
        return complete(self.kind, getattr(flatopt, self.factory)(**self.kwargs))

    @functools.cached_property
    def trained(self) -> tuple[Any, Any]:
        """Parameters and state after `run`: what most tests compare with, so computed once."""
        return run(self.build())

    @functools.cached_property
    def first_step(self) -> tuple[Any, Any]:
        """Parameters and state after one step without `jax.jit`."""
        return run(self.build(), steps=1, transform=lambda f: f)

    @functools.cached_property
    def halved(self) -> optax.GradientTransformationExtraArgs:
        """The method with half of its hyperparameter."""
        assert self.hyperparameter is not None
        return self.build(**{self.hyperparameter: 0.5 * self.kwargs[self.hyperparameter]})

    def build_on(
        self, base: Callable[[], Any], learning_rate: Any, **overrides: Any
    ) -> optax.GradientTransformationExtraArgs:
        """The method on another optimiser than that of the tests, with its learning rate."""
        kwargs = {**self.kwargs, **overrides}
        if "optimizer" in kwargs:
            kwargs["optimizer"] = base()
        if "learning_rate" in kwargs and "learning_rate" not in overrides:
            kwargs["learning_rate"] = learning_rate
        return complete(self.kind, getattr(flatopt, self.factory)(**kwargs), base)

    def build_injected(self) -> optax.GradientTransformationExtraArgs:
        static = [n for n, v in self.kwargs.items() if isinstance(v, int) or callable(v)]
        factory = optax.inject_hyperparams(getattr(flatopt, self.factory), static_args=static)
        return complete(self.kind, factory(**self.kwargs))


def _mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


# fmt: off
CASES = [
    # perturbations
    Case("scale_to_norm", "perturbation", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_adaptive_norm", "perturbation", {"rho": 0.5, "eta": 0.01}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_adaptive_norm", "perturbation", {"rho": 0.5, "mask": _mask}, extra_evaluations=10, variant="mask"),
    Case("scale_by_partial_norm", "perturbation", {"rho": 0.05, "lam": 0.5}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_fisher_norm", "perturbation", {"rho": 0.05, "eta": 2.0}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_spectral_norm", "perturbation", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_layer_norms", "perturbation", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("scale_to_loss_rise", "perturbation", {"budget": 0.1, "max_rho": 0.1}, "budget", 0.0, extra_evaluations=10),
    Case("scale_to_weighted_norm", "perturbation", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10),
    Case("mask_displacement", "direction", {"mask": _mask}, extra_evaluations=10),
    Case("subtract_gradient_ema", "direction", {"sigma": 1.0, "decay": 0.9}, "decay", extra_evaluations=10, copies=1),
    Case("smooth_gradient", "direction", {"decay": 0.6}, "decay", extra_evaluations=10, copies=1),
    Case("keep_large_zscores", "direction", {"quantile": 0.5}, extra_evaluations=10),
    Case("standard_normal", "direction", {"key": 0}, extra_evaluations=10),
    Case("drop_displacement", "direction", {"keep": 0.5, "key": 0}, extra_evaluations=10),
    Case("filter_noise", "perturbation", {"std": 0.1}, "std", 0.0, extra_evaluations=10),
    Case("adaptive_filter_noise", "perturbation", {"std": 0.1, "eta": 1.0, "decay": 0.9}, "std", 0.0, extra_evaluations=10, copies=0.01),
    Case("mask_by_fisher", "perturbation", {"perturbation": flatopt.scale_to_norm(0.05), "sparsity": 0.5, "every": 3}, extra_evaluations=10, copies=1.25),
    Case("mask_at_random", "perturbation", {"perturbation": flatopt.scale_to_norm(0.05), "sparsity": 0.5, "every": 3}, extra_evaluations=10, copies=0.25),
    # combiners
    Case("surrogate_gap", "combiner", {"alpha": 0.4}, "alpha", extra_evaluations=10),
    Case("mix_clean", "combiner", {"alpha": 0.8}, "alpha", 0.0, extra_evaluations=10),
    Case("follow_arc", "combiner", {"alpha": 1.5}, "alpha", extra_evaluations=10),
    # stages
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05)}, extra_evaluations=10),
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05), "num_steps": 3}, extra_evaluations=30, variant="num_steps"),
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05), "start": 4, "every": 3}, extra_evaluations=2, variant="start_every"),
    Case("sam", "stage", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10, bench=Bench("sam")),
    Case("sam", "stage", {"rho": 0.05, "every": 5}, "rho", 0.0, extra_evaluations=2, variant="every", bench=Bench("one gradient", "sam every=5")),
    Case("sam", "stage", {"rho": 0.05, "start": 7}, "rho", 0.0, extra_evaluations=3, variant="start"),
    Case("gradient_at", "stage", {"perturbation": flatopt.scale_to_norm(0.05), "num_steps": 2, "every": 2, "record": True}, extra_evaluations=10, variant="record"),
    Case("asam", "stage", {"rho": 0.5}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("reuse_direction", "stage", {"perturbation": flatopt.scale_to_norm(0.5), "every": 5, "alpha": 0.5}, "alpha", extra_evaluations=2, copies=1),
    Case("looksam", "stage", {"rho": 0.5, "every": 5, "alpha": 0.5}, "rho", 0.0, extra_evaluations=2, copies=1, bench=Bench("one gradient", "looksam every=5", {"rho": 0.05})),
    Case("looksam", "stage", {"rho": 0.2, "every": 3, "alpha": 0.5, "layerwise": True, "start": 2}, "rho", 0.0, extra_evaluations=3, copies=1, variant="layerwise"),
    Case("gsam", "stage", {"rho": 0.05, "alpha": 0.4}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("gsam", "stage", {"rho": 0.05, "alpha": 0.4, "perturbation": flatopt.scale_to_weighted_norm(0.05), "minimise_perturbed": False}, "rho", 0.0, extra_evaluations=10, variant="big_vision"),
    Case("gnp", "stage", {"rho": 0.05, "alpha": 0.8}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("gnp", "stage", {"rho": 0.05, "alpha": 0.8, "normalise_clean": True}, "rho", 0.0, extra_evaluations=10, variant="normalized"),
    Case("friendly_sam", "stage", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10, copies=1, bench=Bench("two gradients")),
    Case("vasso", "stage", {"rho": 0.05}, "rho", 0.0, extra_evaluations=10, copies=1, bench=Bench("two gradients")),
    Case("zsharp", "stage", {"rho": 0.05, "quantile": 0.5}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients and more work", kwargs={"quantile": 0.95})),
    Case("le_sam", "stage", {"budget": 0.1, "max_rho": 0.1}, "budget", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("sparse_sam", "stage", {"rho": 0.05, "mask": _mask}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("sam_on", "stage", {"rho": 0.05, "mask": _mask}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("esam", "stage", {"rho": 0.05, "beta": 0.5}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients and more work")),
    Case("rwp", "stage", {"std": 0.1, "every": 2}, "std", 0.0, extra_evaluations=5, bench=Bench("two gradients and more work", kwargs={"every": None})),
    Case("rwp", "stage", {"std": 0.1, "every": 5}, "std", 0.0, extra_evaluations=2, variant="every", bench=Bench("one gradient", "rwp every=5")),
    Case("arwp", "stage", {"std": 0.1, "eta": 1.0, "decay": 0.9}, "std", 0.0, extra_evaluations=10, copies=0.01, bench=Bench("two gradients and more work")),
    Case("unified_sam", "stage", {"rho": 0.05, "lam": 0.5}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("fisher_sam", "stage", {"rho": 0.05, "eta": 2.0}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("xsam", "stage", {"rho": 0.05, "rho_max": 0.1, "alpha_every": 4}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients and more work", kwargs={"alpha_every": 100})),
    Case("xsam", "stage", {"rho": 0.05, "alpha": 1.5, "num_steps": 3, "start": 4, "every": 3}, "rho", 0.0, extra_evaluations=6, variant="alpha"),
    Case("sassha", "stage", {"rho": 0.05, "b1": 0.5, "eps": 0.5, "every": 5}, "rho", extra_evaluations=12, copies=2, bench=Bench("two gradients and more work", "sassha every=10", {"every": 10})),
    Case("sassha", "stage", {"rho": 0.5, "b1": 0.2, "power": 1.0, "eps": 0.5, "every": 1, "perturbation": flatopt.scale_to_adaptive_norm(0.5)}, extra_evaluations=20, copies=2, variant="power"),
    Case("scale_by_hutchinson", "stage", {"power": 0.5, "b1": 0.5, "eps": 0.5, "every": 5}, "power", extra_evaluations=2, copies=2),
    # local entropy
    Case("langevin", "wrapper", {"learning_rate": 0.05, "temperature": 1e-4}, "temperature", copies=-1, bench=Bench("inner loops and replicas")),
    Case("local_entropy", "stage", {"num_steps": 4, "gamma": 0.5, "noise": 0.01}, "gamma", extra_evaluations=30, bench=Bench("inner loops and replicas", "local_entropy L=5", {"num_steps": 5})),
    Case("local_entropy", "stage", {"num_steps": 4, "gamma": 0.5, "momentum": 0.5, "initial_gradient": False, "scale_by_gamma": True}, "gamma", extra_evaluations=40, variant="all"),
    Case("local_entropy", "stage", {"num_steps": 0, "gamma": 0.5}, variant="no_steps"),
    Case("local_entropy", "stage", {"num_steps": 1, "gamma": 0.5, "inner_learning_rate": 0.2}, "inner_learning_rate", variant="one_step"),
    Case("entropy_sgd", "wrapper", {"learning_rate": 0.1, "num_steps": 4, "gamma": 0.5, "inner_momentum": 0.5}, "learning_rate", extra_evaluations=40, bench=Bench("inner loops and replicas", "entropy_sgd L=5", {"num_steps": 5})),
    Case("entropy_sgd", "wrapper", {"learning_rate": 0.5, "num_steps": 4, "gamma": 0.5, "form": "lua"}, "gamma", extra_evaluations=40, copies=-1, variant="lua"),
    Case("entropy_sgd", "wrapper", {"learning_rate": 0.2, "num_steps": 4, "gamma": 0.5, "form": "pittorino"}, "gamma", extra_evaluations=30, variant="pittorino"),
    # replicas; the axis name () makes a single one
    Case("couple_replicas", "stage", {"strength": 0.5, "axis_name": ()}),
    Case("couple_replicas", "stage", {"strength": 0.5, "axis_name": (), "every": 2}, variant="every"),
    Case("parle", "wrapper", {"learning_rate": 0.05, "gamma": 0.1, "rho": 0.1, "every": 3, "axis_name": ()}, "gamma", copies=3, bench=Bench("inner loops and replicas", "parle L=5, one replica", {"every": 5})),
    Case("gossip", "wrapper", {"optimizer": sgd(), "mixing": "full", "axis_name": ()}),
    Case("hold_replicas", "wrapper", {"optimizer": sgd(), "number": 1}),
    Case("hold_replicas", "wrapper", {"optimizer": optax.chain(flatopt.sam(0.05), sgd()), "number": 2, "std": 0.1}, extra_evaluations=30, copies=2, variant="sam"),
    Case("replicated_sgd", "wrapper", {"optimizer": sgd(), "number": 3, "strength": 0.5, "std": 0.1}, "strength", extra_evaluations=20, copies=4, bench=Bench("inner loops and replicas", "replicated_sgd 3 replicas")),
    # wrappers
    Case("wsam", "wrapper", {"optimizer": sgd(), "learning_rate": LEARNING_RATE, "rho": 0.05, "gamma": 0.8}, "rho", 0.0, extra_evaluations=10, bench=Bench("two gradients")),
    Case("wsam", "wrapper", {"optimizer": sgd(), "learning_rate": LEARNING_RATE, "rho": 0.05, "gamma": 0.5, "decouple": False, "max_norm": 10.0}, "rho", 0.0, extra_evaluations=10, variant="coupled"),
    Case("bsam", "wrapper", {"learning_rate": 0.05, "rho": 0.01, "num_data": 100.0}, "rho", extra_evaluations=20, copies=1, bench=Bench("two gradients and more work")),
    Case("sampa", "wrapper", {"optimizer": sgd(), "rho": 0.05}, "rho", 0.0, extra_evaluations=20, copies=1, bench=Bench("two gradients and more work")),
    Case("hold_perturbed", "wrapper", {"optimizer": sgd(), "perturbation": flatopt.scale_to_norm(0.05)}, copies=1, bench=Bench("one gradient")),
    Case("msam", "wrapper", {"optimizer": sgd(), "rho": 0.1}, "rho", 0.0, bench=Bench("one gradient", kwargs={"rho": 0.05})),
    Case("msam", "wrapper", {"optimizer": sgd(), "rho": -0.1}, "rho", 0.0, variant="ascent"),
    Case("msam_sgd", "wrapper", {"learning_rate": LEARNING_RATE, "rho": 0.1}, "rho", 0.0, bench=Bench("one gradient", kwargs={"rho": 0.05})),
    Case("msam", "wrapper", {"optimizer": optax.adamw(0.05), "rho": 0.1}, "rho", 0.0, variant="adamw", bench=Bench("adamw", "msam on adamw")),
    Case("alternate", "wrapper", {"perturbation": flatopt.scale_to_norm(0.05), "optimizer": sgd()}, copies=1, bench=Bench("one gradient")),
    Case("alternate", "wrapper", {"perturbation": flatopt.scale_to_adaptive_norm(0.05), "optimizer": optax.adamw(0.05)}, copies=1, variant="adamw"),
    # averaging
    Case("swa", "average", {}, copies=1, bench=Bench("averages")),
    Case("swa", "average", {"start": 3, "every": 2}, copies=1, variant="start_every"),
    Case("params_ema", "average", {"decay": 0.9}, "decay", copies=1, bench=Bench("averages")),
    Case("params_ema", "average", {"decay": 0.99, "debias": False, "warmup_steps": 10}, "decay", copies=1, variant="warmup"),
    Case("bema", "average", {"kappa": 0.5}, "kappa", copies=3, bench=Bench("averages")),
    Case("bema", "average", {"eta": 0.3, "lag": 2.0, "start": 5, "every": 2}, "eta", copies=3, variant="start_every"),
    Case("power_ema", "average", {"exponent": 2.0}, "exponent", copies=1, bench=Bench("averages")),
    Case("lawa", "average", {"window": 3}, copies=3, bench=Bench("averages", "lawa window=3 every=5", {"every": 5})),
    Case("lawa", "average", {"window": 2, "every": 2, "start": 4}, copies=2, variant="start_every"),
    Case("snapshots", "average", {"number": 4, "start": 2, "every": 2}, copies=4, bench=Bench("averages", "snapshots number=4 every=5", {"start": None, "every": 5})),
    Case("swag", "average", {"rank": 3}, copies=2 + 3, bench=Bench("averages", "swag rank=3 every=5", {"every": 5})),
    Case("swag", "average", {"rank": 2, "start": 2, "every": 2}, copies=2 + 2, variant="start_every"),
    # wrappers that average
    Case("lookahead", "wrapper", {"optimizer": sgd(), "every": 3}, copies=1, bench=Bench("averages", kwargs={"every": 5})),
    Case("lookahead", "wrapper", {"optimizer": sgd(), "every": 3, "slow_step_size": 0.8}, "slow_step_size", 1.0, copies=1, variant="step"),
    Case("lookahead", "wrapper", {"optimizer": optax.adamw(0.05), "every": 2, "reset_state": True}, copies=1, variant="reset"),
    Case("lookahead", "wrapper", {"optimizer": sgd(), "every": 2, "pull_back": True, "start": 3}, copies=2, variant="pull_back"),
    Case("periodic_swa", "wrapper", {"optimizer": sgd(), "period": 4}, copies=1, bench=Bench("averages", "periodic_swa period=5", {"period": 5})),
    Case("periodic_swa", "wrapper", {"optimizer": optax.adamw(0.05), "period": 4, "start": 3, "every": 2, "stop": 6}, copies=1, variant="stop"),
    Case("pace", "wrapper", {"learning_rate": 0.05, "strength": 0.15, "b2": 0.9}, "strength", copies=2, bench=Bench("adamw")),  # Adam's two and the mean, less SGD's one.
    Case("pace", "wrapper", {"learning_rate": 0.05, "strength": 0.5, "decay": 0.9, "every": 2}, "strength", copies=2, variant="decay"),
    Case("schedule_free_plus", "wrapper", {"beta": 0.5}, "beta", copies=3, needs_value=True, bench=Bench("adamw")),
    Case("schedule_free_plus", "wrapper", {"direction": optax.scale_by_adam(), "learning_rate": 0.7, "r": 2.0, "norm_decay": 0.7, "weight_decay": 0.1, "start": 3}, "learning_rate", copies=3, needs_value=True, variant="start"),
    # sparse training
    Case("sparse_training", "wrapper", {"optimizer": sgd(), "sparsity": 0.5, "every": 2, "fraction": 0.5}, "fraction", copies=0.25),
    Case("sparse_training", "wrapper", {"optimizer": optax.adamw(0.05, eps=1e-4), "sparsity": 0.5, "grow": "random", "order": "after", "every": 2, "fraction": 0.5}, "fraction", copies=0.25, variant="set"),
    Case("sparse_training", "wrapper", {"optimizer": sgd(), "sparsity": 0.5, "order": "after", "start": 2, "every": 4, "stop": 6, "fraction": 0.5}, extra_evaluations=2, copies=0.25, variant="after"),
    Case("sparse_training", "wrapper", {"optimizer": optax.chain(flatopt.sam(0.05), sgd()), "sparsity": 0.5, "order": "before", "every": 3, "fraction": 0.5}, extra_evaluations=10, copies=0.25, variant="sam"),
    Case("sparse_training", "wrapper", {"optimizer": sgd(), "sparsity": 0.5, "grow": None}, copies=0.25, variant="static"),
    # the sphere
    Case("project_to_sphere", "average", {"radius": 0.3}, "radius"),
    Case("project_to_sphere", "average", {"groups": "leaf", "radius": 0.1, "tangent": True}, "radius", variant="leaf_tangent"),
    Case("project_to_sphere", "average", {"groups": "unit", "radius": 0.05}, "radius", copies=0.01, variant="unit"),
    Case("fixed_elr", "wrapper", {"learning_rate": 0.05, "radius": 0.3}, "learning_rate", copies=-1),
    Case("record_effective_learning_rate", "stage", {"learning_rate": LEARNING_RATE}),
    # curvature
    Case("scale_by_kfac", "preconditioner", {"damping": 0.5, "inverse_every": 2}, "damping", copies=4),
    Case("scale_by_kfac", "preconditioner", {"damping": 0.5, "inverse": "exact", "every": 2}, "damping", copies=5, variant="exact"),
    Case("scale_by_kfac", "preconditioner", {"damping": 0.5, "inverse": "eigen", "inverse_every": 3, "max_kl": 0.01, "learning_rate": LEARNING_RATE}, "damping", copies=5, variant="eigen"),
    # learning rates
    Case("sgd_by_curvature", "wrapper", {"learning_rate": 0.05, "every": 5, "num_steps": 4, "max_learning_rate": 0.1}, "max_learning_rate", extra_evaluations=8),
    Case("sgd_by_curvature", "wrapper", {"learning_rate": 0.05, "momentum": 0.9, "start": 3, "every": 3, "num_steps": 3, "rule": "median"}, extra_evaluations=9, variant="median"),
    # monitoring
    Case("record_gradient_norm", "stage", {}),
    Case("record_distance", "average", {"average": flatopt.swa()}, copies=1),
    Case("record_cosine", "wrapper", {"optimizer": sgd()}),
    # recipes
    Case("gadam", "wrapper", {"learning_rate": 0.05, "start": 3}, copies=2, bench=Bench("adamw", kwargs={"start": 1, "every": 5})),  # Adam's two and the mean, less SGD's one.
    Case("gadamx", "wrapper", {"learning_rate": 0.05, "start": 3}, copies=3, bench=Bench("adamw", kwargs={"start": 1, "every": 5})),
    Case("wasam", "wrapper", {"optimizer": sgd(), "rho": 0.05, "start": 3}, "rho", extra_evaluations=10, copies=1, bench=Bench("two gradients", kwargs={"start": None})),
]
# fmt: on


def cases(**conditions: Callable[[Case], bool]) -> list[Any]:
    """The cases that meet every condition, as pytest parameters named after them."""
    import pytest  # Not above: benchmarks and documentation read `CASES` without it.

    chosen = [c for c in CASES if all(condition(c) for condition in conditions.values())]
    return [pytest.param(c, id=c.name) for c in chosen]


def main_cases(**conditions: Callable[[Case], bool]) -> list[Any]:
    """For slow tests: pieces of a method, and variants of one, run with the exhaustive tests."""
    import pytest

    def mark(case: Case) -> Any:
        piece = case.kind in ("perturbation", "direction", "combiner")
        marks = [pytest.mark.exhaustive] if piece or case.variant else []
        return pytest.param(case, id=case.name, marks=marks)

    return [mark(c) for c in CASES if all(condition(c) for condition in conditions.values())]


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
        value, grads = jax.value_and_grad(loss)(params, batch)
        extra = {"value": value, "grad_fn": flatopt.make_grad_fn(loss, batch), **extra_args}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return step


@dataclasses.dataclass(frozen=True)
class GradientByHand:
    """A `grad_fn` that is no loss's, with values for the methods that ask for them too.

    Attributes:
      gradient: called as `gradient(params, i)`.
      value: called as `value(params)`.
    """

    gradient: Callable[[Any, Any], Any]
    value: Callable[[Any], jax.Array] = optax.tree.norm

    def __call__(self, params: Any, i: Any) -> Any:
        return self.gradient(params, i)


@functools.lru_cache(maxsize=64)
def _jitted_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., tuple[Any, Any]]:
    return jax.jit(train_step(tx))


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
    step = _jitted_step(tx) if transform is jax.jit else transform(train_step(tx))
    for i in range(first, first + steps):
        params, opt_state = step(params, opt_state, make_batch(i))
    return params, opt_state


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal structure, dtypes and bits (the sign of zero aside)."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert structures[0] == structures[1]
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(e)
        np.testing.assert_array_equal(_numpy(a), _numpy(e))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal structure and close values."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert structures[0] == structures[1]
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(_numpy(a), _numpy(e), rtol=rtol, atol=atol)


def _numpy(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
