"""What restores quality after pruning: batch-norm refresh, fine-tuning with masks held."""

from secateur.recover.adapters import AdapterSpec
from secateur.recover.bn import refresh_batchnorm
from secateur.recover.distil import Distil, taught
from secateur.recover.finetune import History, finetune, train_step
from secateur.recover.loop import TrainStep
from secateur.recover.optimizers import build_optimizer

__all__ = [
    "AdapterSpec",
    "Distil",
    "History",
    "TrainStep",
    "build_optimizer",
    "finetune",
    "refresh_batchnorm",
    "taught",
    "train_step",
]
