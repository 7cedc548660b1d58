"""What takes a pruned model elsewhere: to speed on this machine, or to another runtime."""

from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.decisions import Deployment, LayerDecision
from secateur.deployment.folders import load_deployed, save_deployed
from secateur.deployment.linear import SparseLinear, densify
from secateur.deployment.onnx import OnnxExport, export_onnx
from secateur.deployment.planner import deploy

__all__ = [
    "LayerDecision", "Deployment", "OnnxExport", "SparseConv2d", "SparseLinear", "densify", "deploy", "export_onnx",
    "load_deployed", "save_deployed",
]  # fmt: skip
