"""Masks: zeros that stay. One owner writes, holds, changes and counts them, and takes them back."""

from secateur.masks.handle import MaskHandle, mask_model
from secateur.masks.hold import Hold
from secateur.masks.imported import import_masks, masks_of
from secateur.masks.sparsity import Sparsity, sparsity_of
from secateur.masks.units import Masks, expand

__all__ = ["Hold", "MaskHandle", "Masks", "Sparsity", "expand", "import_masks", "mask_model", "masks_of", "sparsity_of"]
