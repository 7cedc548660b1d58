"""Derivatives of the loss: per sample, per batch, read off the layers of a batch."""
