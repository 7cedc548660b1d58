"""Ways out to other runtimes: one file each, one interface, one registry.

`export`, the command line and the documentation read `EXPORTERS`. A further way out is a file here and a line below.
"""

from secateur.deployment.exports.base import EXPORTERS, Exported, Exporter, export
from secateur.deployment.exports.gguf import GgufExporter
from secateur.deployment.exports.hugging_face import HuggingFaceExporter
from secateur.deployment.exports.onnx import OnnxExport, OnnxExporter, export_onnx
from secateur.deployment.exports.pt2 import Pt2Exporter
from secateur.deployment.exports.tensors import ArchiveExporter, SafetensorsExporter

__all__ = [
    "ArchiveExporter",
    "EXPORTERS",
    "Exported",
    "Exporter",
    "GgufExporter",
    "HuggingFaceExporter",
    "OnnxExport",
    "OnnxExporter",
    "Pt2Exporter",
    "SafetensorsExporter",
    "export",
    "export_onnx",
]
