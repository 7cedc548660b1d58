"""Criteria from the first derivative of the loss."""
