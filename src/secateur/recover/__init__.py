"""What restores quality after pruning: batch-norm refresh, fine-tuning with masks held."""

from secateur.recover.bn import refresh_batchnorm
from secateur.recover.finetune import History, Record, finetune
from secateur.recover.masks import MaskHolder
from secateur.recover.optimizers import build_optimizer

__all__ = ["History", "MaskHolder", "Record", "build_optimizer", "finetune", "refresh_batchnorm"]
