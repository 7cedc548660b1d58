"""Slices of coupled tensors: channels, neurons, heads, head dimensions, groups of convolutions."""
