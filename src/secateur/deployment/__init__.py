"""What takes a pruned model elsewhere: to speed on this machine, or to another runtime."""

from secateur.deployment.archive import load_archive, save_archive
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.decisions import Deployment, LayerDecision
from secateur.deployment.exports import EXPORTERS, Exported, OnnxExport, export, export_onnx
from secateur.deployment.folders import load_deployed, save_deployed
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import densify
from secateur.deployment.planner import deploy

__all__ = [
    "Deployment", "EXPORTERS", "Exported", "LayerDecision", "OnnxExport", "SparseConv2d", "SparseLinear", "densify",
    "deploy", "export", "export_onnx", "load_archive", "load_deployed", "save_archive", "save_deployed",
]  # fmt: skip
