"""secateur: prune any PyTorch model, prove that the result is right, measure what it brings."""
