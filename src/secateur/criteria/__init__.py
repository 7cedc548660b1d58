"""Criteria: weights and statistics in, scores out (higher = keep). One per file, each registered here."""

from secateur.criteria.accumulator import Accumulator
from secateur.criteria.activations.activation_variance import ActivationVariance
from secateur.criteria.activations.apoz import APoZ
from secateur.criteria.activations.lasso import Lasso
from secateur.criteria.activations.mean_activation import MeanActivation
from secateur.criteria.activations.reap import Reap
from secateur.criteria.activations.ria import RIA
from secateur.criteria.activations.structured_obs import StructuredOBS
from secateur.criteria.activations.thinet import ThiNet
from secateur.criteria.activations.wanda import Wanda
from secateur.criteria.base import Context, Criterion, get, names, register
from secateur.criteria.curvature.fisher import Fisher
from secateur.criteria.curvature.gauss_newton import GaussNewton
from secateur.criteria.curvature.kfac import KroneckerCurvature
from secateur.criteria.curvature.obd import OptimalBrainDamage
from secateur.criteria.curvature.obs import OptimalBrainSurgeon
from secateur.criteria.depth.angular_distance import AngularDistance
from secateur.criteria.depth.block_influence import BlockInfluence
from secateur.criteria.depth.every import Every
from secateur.criteria.depth.loss_increase import LossIncrease
from secateur.criteria.forecast import CostWarning
from secateur.criteria.gradients.gates import GateScore
from secateur.criteria.gradients.gradient import Gradient
from secateur.criteria.gradients.grasp import Grasp
from secateur.criteria.gradients.head_gate import HeadImportance
from secateur.criteria.gradients.integrated import IntegratedGradients
from secateur.criteria.gradients.loss_gradient import StationaryWarning
from secateur.criteria.gradients.movement import Movement, MovementAccumulator
from secateur.criteria.gradients.snip import Snip
from secateur.criteria.gradients.synflow import SynFlow
from secateur.criteria.gradients.taylor import Taylor
from secateur.criteria.sums import reduce_spans
from secateur.criteria.weights.bn_scale import NormScale
from secateur.criteria.weights.geometric_median import GeometricMedian
from secateur.criteria.weights.magnitude import Magnitude
from secateur.criteria.weights.random_control import Random
from secateur.model.gates import Gate, Gates, gates_of, insert_gates

__all__ = [
    "APoZ",
    "Accumulator",
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
    "CostWarning",
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
