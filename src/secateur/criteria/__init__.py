"""Criteria: weights and statistics in, scores out (higher = keep). One per file, each registered here."""

from secateur.criteria.activation_variance import ActivationVariance
from secateur.criteria.angular_distance import AngularDistance
from secateur.criteria.apoz import APoZ
from secateur.criteria.base import Context, Criterion, get, names, reduce_spans, register
from secateur.criteria.block_influence import BlockInfluence
from secateur.criteria.bn_scale import NormScale
from secateur.criteria.every import Every
from secateur.criteria.fisher import Fisher
from secateur.criteria.gates import Gate, Gates, GateScore, gates_of, insert_gates
from secateur.criteria.gauss_newton import GaussNewton
from secateur.criteria.geometric_median import GeometricMedian
from secateur.criteria.gradient import Gradient
from secateur.criteria.grasp import Grasp
from secateur.criteria.head_gate import HeadImportance
from secateur.criteria.integrated import IntegratedGradients
from secateur.criteria.kfac import KroneckerCurvature
from secateur.criteria.lasso import Lasso
from secateur.criteria.loss_gradient import StationaryWarning
from secateur.criteria.loss_increase import LossIncrease
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.movement import Movement, MovementAccumulator
from secateur.criteria.obd import OptimalBrainDamage
from secateur.criteria.obs import OptimalBrainSurgeon
from secateur.criteria.random_control import Random
from secateur.criteria.reap import Reap
from secateur.criteria.ria import RIA
from secateur.criteria.snip import Snip
from secateur.criteria.structured_obs import StructuredOBS
from secateur.criteria.synflow import SynFlow
from secateur.criteria.taylor import Taylor
from secateur.criteria.thinet import ThiNet
from secateur.criteria.wanda import Wanda

__all__ = [
    "APoZ",
    "ActivationVariance",
    "AngularDistance",
    "BlockInfluence",
    "Context",
    "Criterion",
    "Every",
    "Fisher",
    "Gate",
    "GateScore",
    "Gates",
    "GaussNewton",
    "GeometricMedian",
    "Gradient",
    "Grasp",
    "HeadImportance",
    "IntegratedGradients",
    "KroneckerCurvature",
    "Lasso",
    "LossIncrease",
    "Magnitude",
    "MeanActivation",
    "Movement",
    "MovementAccumulator",
    "NormScale",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "RIA",
    "Random",
    "Reap",
    "Snip",
    "StationaryWarning",
    "StructuredOBS",
    "SynFlow",
    "Taylor",
    "ThiNet",
    "Wanda",
    "gates_of",
    "get",
    "insert_gates",
    "names",
    "reduce_spans",
    "register",
]
