"""What restores quality after pruning: batch-norm refresh, fine-tuning with masks held."""

from secateur.recover.bn import refresh_batchnorm
from secateur.recover.finetune import History, TrainStep, finetune, train_step
from secateur.recover.optimizers import build_optimizer

__all__ = ["History", "TrainStep", "build_optimizer", "finetune", "refresh_batchnorm", "train_step"]
