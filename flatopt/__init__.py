"""flatopt: flat minima for JAX, as composable optax transformations.

SAM and its family      sam, asam, gsam, msam, sassha, ...: gradients at a displaced point
Averages                swa, params_ema, bema, swag, lookahead, ...: which weights are kept
Local entropy           local_entropy, entropy_sgd, langevin: a Langevin loop around the weights
Replicas                replicated_sgd, parle, gossip, ...: several copies that attract each other
Sparse training         sparse_training: few weights, and which ones is learnt (RigL, SET)
The sphere              project_to_sphere, fixed_elr: weights of fixed norm
Curvature               scale_by_kfac: K-FAC and EKFAC, from statistics of the layers
Learning rates          sgd_by_curvature, batch_scaling: measured or computed, not tuned
By name                 methods(): what there is, for scripts and trainers that choose by a string
Evaluation              eval_params(opt_state, params): the weights to evaluate, for all of these
Monitoring              record_distance, record_cosine, ...: numbers about a run, in its state
flatopt.measures        how flat is it? eigenvalues, sharpness, local energy, barriers
flatopt.curves          low-loss paths between solutions
flatopt.landscape       the loss along lines and planes; flatopt.plots draws it (matplotlib)
flatopt.samplers        batches whose noise is correlated in time
flatopt.linen, .nnx     adapters for Flax, imported by name; flatopt.equinox for Equinox
"""

import importlib
from typing import TYPE_CHECKING, Any

from flatopt._averaging.batch_stats import average_batch_stats
from flatopt._averaging.bema import BemaState, bema
from flatopt._averaging.fast_geometric_ensemble import (
    cyclic_triangle_schedule,
    ensemble_predict,
    fast_geometric_ensemble,
)
from flatopt._averaging.gadam import gadam, gadamx
from flatopt._averaging.lawa import LawaState, lawa
from flatopt._averaging.lookahead import LookaheadState, lookahead
from flatopt._averaging.merging import greedy_soup, merge_params, merge_weights
from flatopt._averaging.pace import PaceState, pace
from flatopt._averaging.params_ema import ema_decay_schedule, params_ema
from flatopt._averaging.periodic_swa import PeriodicSwaState, periodic_swa
from flatopt._averaging.power_ema import power_ema
from flatopt._averaging.running_mean import AverageState
from flatopt._averaging.schedule_free_plus import ScheduleFreePlusState, schedule_free_plus
from flatopt._averaging.snapshots import snapshot_params, snapshots
from flatopt._averaging.swa import constant_phase_start, swa, swa_schedule
from flatopt._averaging.swag import SwagCovariance, SwagState, sample_params, swag, swag_covariance
from flatopt._averaging.wasam import wasam
from flatopt._core.eval_params import HoldsEvalParams, eval_params, holds_eval_params
from flatopt._core.grad_fn import GradFn, GradientFunction, make_grad_fn
from flatopt._core.layer_statistics import (
    LayerStatistics,
    StatisticsFunction,
    StatsFn,
    make_stats_fn,
)
from flatopt._core.registry import Method, methods
from flatopt._core.taps import tap
from flatopt._curvature.scale_by_kfac import KfacState, scale_by_kfac
from flatopt._entropy.entropy_sgd import entropy_sgd
from flatopt._entropy.exponential_scoping import exponential_scoping
from flatopt._entropy.langevin import langevin
from flatopt._entropy.local_entropy import local_entropy
from flatopt._learning_rates.batch_scaling import batch_scaling
from flatopt._learning_rates.sgd_by_curvature import SgdByCurvatureState, sgd_by_curvature
from flatopt._monitoring import (
    CosineState,
    DistanceState,
    GradientNormState,
    record_cosine,
    record_distance,
    record_gradient_norm,
)
from flatopt._replicas.couple_replicas import couple_replicas
from flatopt._replicas.gossip import gossip, mixing_matrix
from flatopt._replicas.hold_replicas import HoldReplicasState, hold_replicas
from flatopt._replicas.parle import parle
from flatopt._replicas.replicas import barycentre, replicate_params
from flatopt._replicas.replicated_sgd import replicated_sgd, strength_schedule
from flatopt._sam.alternate import AlternateState, alternate
from flatopt._sam.arwp import adaptive_filter_noise, arwp
from flatopt._sam.asam import asam
from flatopt._sam.ascent import mask_displacement, scale_to_adaptive_norm, scale_to_norm
from flatopt._sam.bsam import bsam
from flatopt._sam.combiners import mix_clean
from flatopt._sam.empirical_fisher import empirical_fisher
from flatopt._sam.esam import drop_displacement, esam, make_selective_grad_fn, select_examples
from flatopt._sam.fisher_sam import fisher_sam, scale_to_fisher_norm
from flatopt._sam.friendly_sam import friendly_sam, subtract_gradient_ema
from flatopt._sam.functional_sam import functional_value_and_grad
from flatopt._sam.gnp import gnp
from flatopt._sam.gradient_at import SharpnessState, gradient_at
from flatopt._sam.gsam import gsam, proportional_rho_schedule, scale_to_weighted_norm, surrogate_gap
from flatopt._sam.hold_perturbed import HoldPerturbedState, hold_perturbed
from flatopt._sam.le_sam import le_sam, scale_to_loss_rise
from flatopt._sam.looksam import looksam, reuse_direction, scale_to_layer_norms
from flatopt._sam.msam import MsamState, msam, msam_sgd
from flatopt._sam.noise import filter_noise, standard_normal
from flatopt._sam.rwp import rwp
from flatopt._sam.sam import sam
from flatopt._sam.sam_on import normalisation_mask, sam_on
from flatopt._sam.sampa import sampa
from flatopt._sam.sassha import sassha, scale_by_hutchinson
from flatopt._sam.sparse_sam import mask_at_random, mask_by_fisher, sparse_sam
from flatopt._sam.spectral_norm import scale_to_spectral_norm
from flatopt._sam.unified_sam import scale_by_partial_norm, unified_sam
from flatopt._sam.value_and_grad import sam_value_and_grad
from flatopt._sam.vasso import smooth_gradient, vasso
from flatopt._sam.wsam import wsam
from flatopt._sam.xsam import follow_arc, xsam
from flatopt._sam.zsharp import keep_large_zscores, zsharp
from flatopt._sparse.densities import erk_sparsities, mask_density
from flatopt._sparse.sparse_training import SparseTrainingState, sparse_training
from flatopt._sphere.effective_learning_rate import (
    EffectiveLearningRateState,
    record_effective_learning_rate,
)
from flatopt._sphere.fixed_elr import fixed_elr
from flatopt._sphere.project_to_sphere import ProjectToSphereState, project_to_sphere

if TYPE_CHECKING:
    from flatopt import curves, landscape, measures, samplers

__version__ = "0.1.0.dev0"

__all__ = [  # noqa: RUF022 (grouped by family)
    # modules
    "curves",
    "landscape",
    "measures",
    "samplers",
    # gradients
    "eval_params",
    "GradFn",
    "GradientFunction",
    "holds_eval_params",
    "HoldsEvalParams",
    "make_grad_fn",
    # by name
    "Method",
    "methods",
    # SAM and its family: pieces
    "filter_noise",
    "gradient_at",
    "mask_displacement",
    "mix_clean",
    "scale_to_adaptive_norm",
    "scale_to_norm",
    "scale_to_spectral_norm",
    "SharpnessState",
    "standard_normal",
    # SAM and its family: a paper a file
    "adaptive_filter_noise",
    "alternate",
    "AlternateState",
    "arwp",
    "asam",
    "bsam",
    "drop_displacement",
    "empirical_fisher",
    "esam",
    "fisher_sam",
    "follow_arc",
    "friendly_sam",
    "functional_value_and_grad",
    "gnp",
    "gsam",
    "hold_perturbed",
    "HoldPerturbedState",
    "keep_large_zscores",
    "le_sam",
    "looksam",
    "make_selective_grad_fn",
    "mask_at_random",
    "mask_by_fisher",
    "msam",
    "msam_sgd",
    "MsamState",
    "normalisation_mask",
    "proportional_rho_schedule",
    "reuse_direction",
    "rwp",
    "sam",
    "sam_on",
    "sam_value_and_grad",
    "sampa",
    "sassha",
    "scale_by_hutchinson",
    "scale_by_partial_norm",
    "scale_to_fisher_norm",
    "scale_to_layer_norms",
    "scale_to_loss_rise",
    "scale_to_weighted_norm",
    "select_examples",
    "smooth_gradient",
    "sparse_sam",
    "subtract_gradient_ema",
    "surrogate_gap",
    "unified_sam",
    "vasso",
    "wsam",
    "xsam",
    "zsharp",
    # averages
    "average_batch_stats",
    "AverageState",
    "bema",
    "BemaState",
    "constant_phase_start",
    "cyclic_triangle_schedule",
    "ema_decay_schedule",
    "ensemble_predict",
    "fast_geometric_ensemble",
    "gadam",
    "gadamx",
    "greedy_soup",
    "lawa",
    "LawaState",
    "lookahead",
    "LookaheadState",
    "merge_params",
    "merge_weights",
    "pace",
    "PaceState",
    "params_ema",
    "periodic_swa",
    "PeriodicSwaState",
    "power_ema",
    "sample_params",
    "schedule_free_plus",
    "ScheduleFreePlusState",
    "snapshot_params",
    "snapshots",
    "swa",
    "swa_schedule",
    "swag",
    "swag_covariance",
    "SwagCovariance",
    "SwagState",
    "wasam",
    # local entropy
    "entropy_sgd",
    "exponential_scoping",
    "langevin",
    "local_entropy",
    # replicas
    "barycentre",
    "couple_replicas",
    "gossip",
    "hold_replicas",
    "HoldReplicasState",
    "mixing_matrix",
    "parle",
    "replicate_params",
    "replicated_sgd",
    "strength_schedule",
    # sparse training
    "erk_sparsities",
    "mask_density",
    "sparse_training",
    "SparseTrainingState",
    # the sphere
    "EffectiveLearningRateState",
    "fixed_elr",
    "project_to_sphere",
    "ProjectToSphereState",
    "record_effective_learning_rate",
    # curvature
    "KfacState",
    "LayerStatistics",
    "make_stats_fn",
    "scale_by_kfac",
    "StatisticsFunction",
    "StatsFn",
    "tap",
    # learning rates
    "batch_scaling",
    "sgd_by_curvature",
    "SgdByCurvatureState",
    # monitoring
    "CosineState",
    "DistanceState",
    "GradientNormState",
    "record_cosine",
    "record_distance",
    "record_gradient_norm",
]

# Loaded when they are first named: most training runs need none of them.
_LAZY = frozenset({"curves", "landscape", "measures", "samplers"})


def __getattr__(name: str) -> Any:
    """The package or module `name` of flatopt, loaded now."""
    if name in _LAZY:
        return importlib.import_module(f"flatopt.{name}")
    raise AttributeError(f"module 'flatopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public."""
    return sorted([*__all__, "__doc__", "__version__"])
