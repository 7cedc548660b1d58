"""Ratios and recipes that find themselves: sensitivity of single groups, and searches over recipes."""
