"""MODEL and DATA words of the command line, the demo networks and the data that lie at hand."""

from secateur.sources.data import resolve_data
from secateur.sources.demo import build_convnet, build_lenet, train_demo
from secateur.sources.in_memory import DataSet, TensorData
from secateur.sources.metrics import resolve_metric
from secateur.sources.models import Source, on_device, resolve_model

__all__ = [
    "DataSet",
    "Source",
    "TensorData",
    "build_convnet",
    "build_lenet",
    "on_device",
    "resolve_data",
    "resolve_metric",
    "resolve_model",
    "train_demo",
]
