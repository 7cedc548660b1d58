"""Whole layers: blocks of a stack."""
