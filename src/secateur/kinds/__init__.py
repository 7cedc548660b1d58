"""What can be removed, one room per kind: weights, slices, experts, layers."""
