"""Criteria that look at the weights alone."""
