"""Whole experts of a mixture."""
