"""Criteria from the second derivative of the loss."""
