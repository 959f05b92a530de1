"""The table of methods: each row builds an optax optimiser for a run of a given length.

The radii were fixed before the comparison was run, not tuned on its test images. Every method of
`tests/cases.py` has a row; those that are not in `CHOSEN` take the arguments of their case.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

import flatopt
from tests.cases import CASES, Case

MOMENTUM = 0.9
SAM_RHO = 0.2
ASAM_RHO = 1.0  # ASAM measures in units of the weights: the usual advice is 5 to 10 times SAM's.
MSAM_RHO = 0.5
# The others take SAM's radius, and the usual values of what else they have.
GSAM_ALPHA = 0.4
GNP_ALPHA = 0.8
WSAM_GAMMA = 0.8
LOOKSAM_EVERY, LOOKSAM_ALPHA = 5, 0.2
RWP_STD = 0.01

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
EMA_DECAY = 0.99
LAWA_WINDOW = 6
LOOKAHEAD_EVERY = 5
# Adam's rate as a share of SGD's, and its decoupled decay: the ranges that its authors advise.
GADAM_SHARE, GADAM_DECAY = 0.01, 0.2
# Sassha's epsilon: where units are dead there is no curvature, and its usual 1e-4 is a huge step.
SASSHA_EPSILON, SASSHA_DECAY = 0.01, 1e-3


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
      default: whether it runs when the command line names no methods.
      fresh_batches: whether extra gradients are taken on batches of their own.
    """

    name: str
    build: Callable[[Setting], optax.GradientTransformation]
    about: str
    default: bool = True
    fresh_batches: bool = False


def _sgd(setting: Setting) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    return optax.sgd(schedule, momentum=MOMENTUM)


def _sam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(flatopt.sam(SAM_RHO), _sgd(setting))


def _asam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(flatopt.asam(ASAM_RHO), _sgd(setting))


def _before_sgd(
    stage: Callable[[], optax.GradientTransformation],
) -> Callable[[Setting], optax.GradientTransformation]:
    """A builder that chains what `stage` makes before the optimiser of the baseline."""
    return lambda setting: optax.chain(stage(), _sgd(setting))


def _wsam(setting: Setting) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    return flatopt.wsam(_sgd(setting), schedule, rho=SAM_RHO, gamma=WSAM_GAMMA)


def _msam(setting: Setting) -> optax.GradientTransformation:
    return flatopt.msam(_sgd(setting), MSAM_RHO)


def _swa(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(
        _sgd_for_averages(setting),
        flatopt.swa(start=setting.average_start, every=setting.steps_per_epoch),
    )


def _sgd_for_averages(setting: Setting) -> optax.GradientTransformation:
    # A cosine that reaches its floor when the average begins, and is constant from there on.
    schedule = flatopt.swa_schedule(
        setting.learning_rate,
        SWA_FINAL_SHARE * setting.learning_rate,
        transition_steps=setting.average_start,
    )
    return optax.sgd(schedule, momentum=MOMENTUM)


def _params_ema(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(_sgd_for_averages(setting), flatopt.params_ema(EMA_DECAY))


def _lawa(setting: Setting) -> optax.GradientTransformation:
    average = flatopt.lawa(LAWA_WINDOW, every=setting.steps_per_epoch)
    return optax.chain(_sgd_for_averages(setting), average)


def _lookahead(setting: Setting) -> optax.GradientTransformation:
    return flatopt.lookahead(_sgd(setting), every=LOOKAHEAD_EVERY)


def _pswa(setting: Setting) -> optax.GradientTransformation:
    epoch, start = setting.steps_per_epoch, setting.average_start
    # Four periods of whole epochs in what is left, as far as there are so many.
    period = max(1, (setting.steps - start) // (4 * epoch)) * epoch
    # The first period begins with `start` updates made, so its first model comes an epoch later.
    return flatopt.periodic_swa(
        _sgd_for_averages(setting), period, start=start + epoch, every=epoch
    )


def _gadam(setting: Setting) -> optax.GradientTransformation:
    schedule = flatopt.swa_schedule(
        GADAM_SHARE * setting.learning_rate,
        SWA_FINAL_SHARE * GADAM_SHARE * setting.learning_rate,
        transition_steps=setting.average_start,
    )
    return flatopt.gadam(
        schedule,
        weight_decay=GADAM_DECAY,
        start=setting.average_start,
        every=setting.steps_per_epoch,
    )


def _pace(setting: Setting) -> optax.GradientTransformation:
    rate = GADAM_SHARE * setting.learning_rate
    return flatopt.pace(optax.cosine_decay_schedule(rate, setting.steps), weight_decay=GADAM_DECAY)


def _sassha(setting: Setting) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    return optax.chain(
        flatopt.sassha(SAM_RHO, eps=SASSHA_EPSILON),
        optax.add_decayed_weights(SASSHA_DECAY),
        optax.scale_by_learning_rate(schedule),
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

CHOSEN: dict[str, Method] = {
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
        *(
            Method(name, _before_sgd(stage), about, default=False)
            for name, stage, about in (
                (
                    "gsam",
                    lambda: flatopt.gsam(SAM_RHO, GSAM_ALPHA),
                    f"GSAM, rho {SAM_RHO}, alpha {GSAM_ALPHA}",
                ),
                (
                    "gnp",
                    lambda: flatopt.gnp(SAM_RHO, GNP_ALPHA),
                    f"gradient-norm penalty, rho {SAM_RHO}, alpha {GNP_ALPHA}",
                ),
                (
                    "friendly_sam",
                    lambda: flatopt.friendly_sam(SAM_RHO),
                    f"Friendly-SAM, rho {SAM_RHO}",
                ),
                ("vasso", lambda: flatopt.vasso(SAM_RHO), f"VaSSO, rho {SAM_RHO}"),
                (
                    "looksam",
                    lambda: flatopt.looksam(SAM_RHO, every=LOOKSAM_EVERY, alpha=LOOKSAM_ALPHA),
                    f"LookSAM, rho {SAM_RHO}, every {LOOKSAM_EVERY}, alpha {LOOKSAM_ALPHA}",
                ),
                ("rwp", lambda: flatopt.rwp(RWP_STD), f"random weight perturbation, {RWP_STD}"),
            )
        ),
        Method("wsam", _wsam, f"WSAM, rho {SAM_RHO}, gamma {WSAM_GAMMA}", default=False),
        Method("params_ema", _params_ema, f"exponential average, decay {EMA_DECAY}", default=False),
        Method("lawa", _lawa, f"average of the latest {LAWA_WINDOW} epochs", default=False),
        Method(
            "lookahead", _lookahead, f"Lookahead, k {LOOKAHEAD_EVERY}, alpha 0.5", default=False
        ),
        Method("pswa", _pswa, "periodic SWA: as swa, with three or four restarts", default=False),
        Method("pace", _pace, f"AdamW, decay {GADAM_DECAY}, pulled to its mean", default=False),
        Method(
            "schedule_free_plus",
            lambda _: flatopt.schedule_free_plus(),
            "an average of Polyak's steps, without a learning rate",
            default=False,
        ),
        Method(
            "sassha", _sassha, f"SASSHA, rho {SAM_RHO}, epsilon {SASSHA_EPSILON}", default=False
        ),
        Method("gadam", _gadam, f"AdamW, decay {GADAM_DECAY}, averaged as swa", default=False),
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


def _of_case(case: Case) -> Method:
    """A method as its case has it: stages before SGD, averages after it over the last part."""
    factory = getattr(flatopt, case.factory)
    takes = inspect.signature(factory).parameters

    def build(setting: Setting) -> optax.GradientTransformation:
        overrides = {}
        if case.kind == "average" and {"start", "every"} <= set(takes):
            overrides = {"start": setting.average_start, "every": setting.steps_per_epoch}
        base = _sgd_for_averages if case.kind == "average" else _sgd
        rate: Any = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
        if "learning_rate" in takes and takes["learning_rate"].annotation == jax.typing.ArrayLike:
            rate = setting.learning_rate  # A method that chooses its own rates takes a number.
        return case.build_on(lambda: base(setting), rate, **overrides)

    about = (inspect.getdoc(factory) or "").splitlines()[0].rstrip(".")
    return Method(case.factory, build, f"{about}; not tuned", default=False)


METHODS = CHOSEN | {
    case.factory: _of_case(case)
    for case in reversed(CASES)  # The first case of a factory is its plain form.
    if case.kind in ("stage", "average", "wrapper") and case.factory not in CHOSEN
}
