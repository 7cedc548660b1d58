"""Files that are complete or absent, and that never run code when they are read."""

from secateur.files.atomic import atomic_write, publish_dir
from secateur.files.safe import load_json, load_metadata, load_tensors, save_tensors
from secateur.files.seeds import canonical_json, seed_everything, stable_hash
from secateur.files.sniff import sniff

__all__ = [
    "atomic_write",
    "canonical_json",
    "load_json",
    "load_metadata",
    "load_tensors",
    "publish_dir",
    "save_tensors",
    "seed_everything",
    "sniff",
    "stable_hash",
]
