"""Masks: zeros that stay. One owner writes, holds, changes and counts them, and takes them back."""

from secateur.masks.handle import MaskHandle, mask_model
from secateur.masks.imported import import_masks, masks_of
from secateur.masks.optimizers import Hold
from secateur.masks.sparsity import Sparsity, sparsity_of
from secateur.masks.units import expand

__all__ = ["Hold", "MaskHandle", "Sparsity", "expand", "import_masks", "mask_model", "masks_of", "sparsity_of"]
