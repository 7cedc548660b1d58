"""Criteria for whole layers."""
