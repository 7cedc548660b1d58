"""Data -> statistics, streamed batch by batch: activation moments, gradients, curvature."""
