"""flatopt: flat minima for JAX, as composable optax transformations."""

from flatopt import curves as curves
from flatopt import landscape as landscape
from flatopt import measures as measures
from flatopt._average import AverageState as AverageState
from flatopt._average import params_ema as params_ema
from flatopt._average import swa as swa
from flatopt._base import GradFn as GradFn
from flatopt._base import make_grad_fn as make_grad_fn
from flatopt._eval import eval_params as eval_params
from flatopt._gradient_at import GradientAtState as GradientAtState
from flatopt._gradient_at import gradient_at as gradient_at
from flatopt._hold import HoldPerturbedState as HoldPerturbedState
from flatopt._hold import MsamState as MsamState
from flatopt._hold import hold_perturbed as hold_perturbed
from flatopt._hold import msam as msam
from flatopt._methods import asam as asam
from flatopt._methods import sam as sam
from flatopt._methods import wasam as wasam
from flatopt._monitor import CosineState as CosineState
from flatopt._monitor import DistanceState as DistanceState
from flatopt._monitor import GradientNormState as GradientNormState
from flatopt._monitor import SharpnessState as SharpnessState
from flatopt._monitor import record_cosine as record_cosine
from flatopt._monitor import record_distance as record_distance
from flatopt._monitor import record_gradient_norm as record_gradient_norm
from flatopt._monitor import record_sharpness as record_sharpness
from flatopt._perturbations import PerturbationState as PerturbationState
from flatopt._perturbations import mask_displacement as mask_displacement
from flatopt._perturbations import scale_to_adaptive_norm as scale_to_adaptive_norm
from flatopt._perturbations import scale_to_norm as scale_to_norm

__version__ = "0.1.0.dev0"
