"""flatopt: flat minima for JAX, as composable optax transformations."""

from flatopt._average import AverageState as AverageState
from flatopt._average import params_ema as params_ema
from flatopt._average import swa as swa
from flatopt._base import GradFn as GradFn
from flatopt._base import make_grad_fn as make_grad_fn
from flatopt._entropy_sgd import EntropySgdState as EntropySgdState
from flatopt._entropy_sgd import entropy_sgd as entropy_sgd
from flatopt._eval import eval_params as eval_params
from flatopt._gossip import GossipState as GossipState
from flatopt._gossip import gossip as gossip
from flatopt._gossip import mixing_matrix as mixing_matrix
from flatopt._gradient_at import GradientAtState as GradientAtState
from flatopt._gradient_at import gradient_at as gradient_at
from flatopt._hold import HoldPerturbedState as HoldPerturbedState
from flatopt._hold import MsamState as MsamState
from flatopt._hold import hold_perturbed as hold_perturbed
from flatopt._hold import msam as msam
from flatopt._hold_replicas import HoldReplicasState as HoldReplicasState
from flatopt._hold_replicas import hold_replicas as hold_replicas
from flatopt._langevin import LangevinState as LangevinState
from flatopt._langevin import langevin as langevin
from flatopt._local_entropy import LocalEntropyState as LocalEntropyState
from flatopt._local_entropy import local_entropy as local_entropy
from flatopt._methods import asam as asam
from flatopt._methods import sam as sam
from flatopt._methods import wasam as wasam
from flatopt._parle import ParleState as ParleState
from flatopt._parle import parle as parle
from flatopt._perturbations import PerturbationState as PerturbationState
from flatopt._perturbations import mask_displacement as mask_displacement
from flatopt._perturbations import scale_to_adaptive_norm as scale_to_adaptive_norm
from flatopt._perturbations import scale_to_norm as scale_to_norm
from flatopt._replicas import CoupleReplicasState as CoupleReplicasState
from flatopt._replicas import barycentre as barycentre
from flatopt._replicas import couple_replicas as couple_replicas
from flatopt._replicas import replicate_params as replicate_params
from flatopt._replicated import replicated_sgd as replicated_sgd
from flatopt._replicated import strength_schedule as strength_schedule
from flatopt._schedules import exponential_scoping as exponential_scoping

__version__ = "0.1.0.dev0"
