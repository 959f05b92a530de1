"""The table of methods: each row builds an optax optimiser for a run of a given length.

The radii were fixed before the comparison was run, not tuned on its test images. To add a method,
write its builder and put a row in `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import optax

import flatopt

MOMENTUM = 0.9
SAM_RHO = 0.2
ASAM_RHO = 1.0  # ASAM measures in units of the weights: the usual advice is 5 to 10 times SAM's.
MSAM_RHO = 0.5

# Entropy-SGD in the form that wastes no gradient: an update of as many gradients as steps. The loop
# has no momentum, and makes up for it by a larger share of the learning rate.
ENTROPY_STEPS = 5
ENTROPY_GAMMA = 0.01
ENTROPY_RATE = 6.0
REPLICAS = 3
REPLICA_STRENGTH = (0.001, 0.1)  # From the first step to the last.
REPLICA_STD = 0.02

# Averages take the last quarter of the run, one model an epoch.
AVERAGE_FROM = 0.75
# SWA needs weights that keep moving: its learning rate falls to this share, then stays there.
SWA_FINAL_SHARE = 0.5


@dataclass(frozen=True)
class Setting:
    """What a builder may depend on.

    Attributes:
      steps: length of the run; schedules are stretched to it.
      steps_per_epoch: updates in one pass over the training images.
      learning_rate: the highest learning rate.
    """

    steps: int
    steps_per_epoch: int
    learning_rate: float

    @property
    def average_start(self) -> int:
        """Number of the first update whose weights enter an average."""
        return max(1, int(AVERAGE_FROM * self.steps))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      name: how the command line and the table call it.
      build: makes the optimiser.
      about: one line for `--help`.
      fresh_batches: whether extra gradients are taken on batches of their own.
    """

    name: str
    build: Callable[[Setting], optax.GradientTransformation]
    about: str
    fresh_batches: bool = False


def _sgd(setting: Setting) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    return optax.sgd(schedule, momentum=MOMENTUM)


def _sam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(flatopt.sam(SAM_RHO), _sgd(setting))


def _asam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(flatopt.asam(ASAM_RHO), _sgd(setting))


def _msam(setting: Setting) -> optax.GradientTransformation:
    return flatopt.msam(_sgd(setting), MSAM_RHO)


def _swa(setting: Setting) -> optax.GradientTransformation:
    # A cosine that reaches its floor when the average begins, and is constant from there on.
    schedule = optax.cosine_decay_schedule(
        setting.learning_rate, setting.average_start, alpha=SWA_FINAL_SHARE
    )
    return optax.chain(
        optax.sgd(schedule, momentum=MOMENTUM),
        flatopt.swa(start=setting.average_start, every=setting.steps_per_epoch),
    )


def _wasam(setting: Setting) -> optax.GradientTransformation:
    # As in its paper, the learning rate goes on falling while the weights are averaged.
    return flatopt.wasam(
        _sgd(setting), SAM_RHO, start=setting.average_start, every=setting.steps_per_epoch
    )


def _entropy_sgd(setting: Setting) -> optax.GradientTransformation:
    inner = flatopt.local_entropy(
        ENTROPY_STEPS,
        ENTROPY_GAMMA,
        inner_learning_rate=optax.cosine_decay_schedule(
            ENTROPY_RATE * setting.learning_rate, setting.steps
        ),
    )
    return optax.chain(inner, optax.sgd(1.0))  # To the mean of the loop.


def _replicated_sgd(setting: Setting) -> optax.GradientTransformation:
    strength = flatopt.strength_schedule("exponential", *REPLICA_STRENGTH, setting.steps)
    return flatopt.replicated_sgd(_sgd(setting), REPLICAS, strength, std=REPLICA_STD)


BASELINE = "sgd"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(BASELINE, _sgd, f"SGD, momentum {MOMENTUM}, cosine schedule"),
        Method("sam", _sam, f"SAM, rho {SAM_RHO}"),
        Method("asam", _asam, f"adaptive SAM, rho {ASAM_RHO}"),
        Method("msam", _msam, f"Momentum-SAM, rho {MSAM_RHO}"),
        Method(
            "swa",
            _swa,
            f"average of the last {1 - AVERAGE_FROM:.0%}, learning rate constant at "
            f"{SWA_FINAL_SHARE:g} of the highest there",
        ),
        Method(
            "wasam", _wasam, f"SAM, rho {SAM_RHO}, averaged over the last {1 - AVERAGE_FROM:.0%}"
        ),
        Method(
            "entropy_sgd",
            _entropy_sgd,
            f"local entropy, {ENTROPY_STEPS} inner steps, gamma {ENTROPY_GAMMA}",
            fresh_batches=True,
        ),
        Method(
            "replicated_sgd",
            _replicated_sgd,
            f"{REPLICAS} replicas on batches of their own, evaluated at their barycentre",
            fresh_batches=True,
        ),
    )
}
