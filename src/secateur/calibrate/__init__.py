"""Data -> statistics, streamed batch by batch: gradients, curvature, activation moments."""
