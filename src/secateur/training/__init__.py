"""Pruning while weights move: schedules, gradual pruning, regrowth, penalties, movement; for any training loop."""
