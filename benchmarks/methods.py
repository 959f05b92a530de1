"""The methods that the benchmarks measure, each on its base optimiser, and their gradients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

import flatopt
from benchmarks.compare.training import count_gradients

RATE, MOMENTUM, RHO = 0.01, 0.9, 0.05
ADAM_RATE = 1e-3
EMA_DECAY = 0.999
EVERY = 5  # Of the methods that do something once in a while; a turn is a multiple of it.
ALPHA = 0.5  # Of LookSAM.
INNER_STEPS, GAMMA = 5, 0.1
REPLICAS = 3

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs
Build = Callable[[], Optimizer]


def sgd() -> Optimizer:
    """The base optimiser of most methods."""
    return optax.sgd(RATE, momentum=MOMENTUM)


def adamw() -> Optimizer:
    """The base optimiser of Gadam."""
    return optax.adamw(ADAM_RATE)


def _before(stage: Callable[[], Any]) -> Build:
    return lambda: optax.chain(stage(), sgd())


def _after(stage: Callable[[], Any]) -> Build:
    return lambda: optax.chain(sgd(), stage())


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


# The base, then the methods that take turns with it: ratios are of neighbours in time.
GROUPS: dict[str, dict[str, Build]] = {
    "sam": {"sgd": sgd, "sam": _before(lambda: flatopt.sam(RHO))},
    "one gradient": {
        "sgd": sgd,
        "msam": lambda: flatopt.msam(sgd(), RHO),
        "msam_sgd": lambda: flatopt.msam_sgd(RATE, RHO, momentum=MOMENTUM),
        "hold_perturbed": lambda: flatopt.hold_perturbed(sgd(), flatopt.scale_to_norm(RHO)),
        "alternate": lambda: flatopt.alternate(sgd(), flatopt.scale_to_norm(RHO)),
        "sam every=5": _before(lambda: flatopt.sam(RHO, every=EVERY)),
        "looksam every=5": _before(lambda: flatopt.looksam(RHO, every=EVERY, alpha=ALPHA)),
        "rwp every=5": _before(lambda: flatopt.rwp(0.01, every=EVERY)),
    },
    "averages": {
        "sgd": sgd,
        "swa": _after(flatopt.swa),
        "params_ema": _after(lambda: flatopt.params_ema(EMA_DECAY)),
        "lookahead": lambda: flatopt.lookahead(sgd(), every=EVERY),
        "power_ema": _after(lambda: flatopt.power_ema(2.0)),
        "lawa window=3 every=5": _after(lambda: flatopt.lawa(3, every=EVERY)),
        "snapshots number=4 every=5": _after(lambda: flatopt.snapshots(4, every=EVERY)),
        "swag rank=3 every=5": _after(lambda: flatopt.swag(3, every=EVERY)),
        "periodic_swa period=5": lambda: flatopt.periodic_swa(sgd(), EVERY),
    },
    "two gradients": {
        "sgd": sgd,
        "asam": _before(lambda: flatopt.asam(RHO)),
        "gsam": _before(lambda: flatopt.gsam(RHO, 0.4)),
        "gnp": _before(lambda: flatopt.gnp(RHO, 0.8)),
        "wsam": lambda: flatopt.wsam(sgd(), RATE, rho=RHO),
        "friendly_sam": _before(lambda: flatopt.friendly_sam(RHO)),
        "vasso": _before(lambda: flatopt.vasso(RHO)),
        "le_sam": _before(lambda: flatopt.le_sam(0.1, RHO)),
        "sparse_sam": _before(lambda: flatopt.sparse_sam(RHO, _matrices)),
        "sam_on": _before(lambda: flatopt.sam_on(RHO, mask=_matrices)),
        "wasam": lambda: flatopt.wasam(sgd(), RHO),
    },
    "two gradients and more work": {
        "sgd": sgd,
        "zsharp": _before(lambda: flatopt.zsharp(RHO)),
        "esam": _before(lambda: flatopt.esam(RHO, beta=0.5)),
        "rwp": _before(lambda: flatopt.rwp(0.01)),
        "arwp": _before(lambda: flatopt.arwp(0.01, eta=1.0, decay=0.9)),
        "sampa": lambda: flatopt.sampa(sgd(), RHO),
    },
    "inner loops and replicas": {
        "sgd": sgd,
        "langevin": lambda: flatopt.langevin(RATE, 1e-8),
        "local_entropy L=5": _before(lambda: flatopt.local_entropy(INNER_STEPS, GAMMA)),
        "entropy_sgd L=5": lambda: flatopt.entropy_sgd(RATE, INNER_STEPS, GAMMA),
        "parle L=5, one replica": lambda: flatopt.parle(
            RATE, GAMMA, 0.1, every=INNER_STEPS, axis_name=()
        ),
        "replicated_sgd 3 replicas": lambda: flatopt.replicated_sgd(sgd(), REPLICAS, 0.1),
    },
    "adamw": {
        "adamw": adamw,
        "msam on adamw": lambda: flatopt.msam(adamw(), RHO),
        "gadam": lambda: flatopt.gadam(ADAM_RATE, start=1, every=EVERY),
        "gadamx": lambda: flatopt.gadamx(ADAM_RATE, start=1, every=EVERY),
    },
}

METHODS: dict[str, Build] = {
    name: build for group in GROUPS.values() for name, build in group.items()
}

# What most users take: measured on every model.
MAIN = [
    "sgd", "sam", "msam", "msam_sgd", "sam every=5", "looksam every=5", "swa",
    "params_ema", "lookahead", "asam", "gsam", "wsam", "local_entropy L=5",
]  # fmt: skip


def base_of(name: str) -> str:
    """The name of the base optimiser of a method: the first one of its group."""
    group = next(group for group in GROUPS.values() if name in group)
    return next(iter(group))


def chosen_groups(names: list[str]) -> dict[str, dict[str, Build]]:
    """The groups, without the methods that are not in `names`; bases stay."""
    groups = {}
    for title, group in GROUPS.items():
        base = next(iter(group))
        own = {name: build for name, build in group.items() if name == base or name in names}
        # A base alone is measured in other groups.
        if len(own) > 1:
            groups[title] = own
    return groups


def gradients_per_step(name: str) -> float:
    """Gradient evaluations a step, counted over four periods of a method."""
    steps = 4 * EVERY
    return count_gradients(METHODS[name](), steps) / steps
