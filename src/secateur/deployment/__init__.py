"""What takes a pruned model elsewhere."""

from secateur.deployment.onnx import OnnxExport, export_onnx

__all__ = ["OnnxExport", "export_onnx"]
