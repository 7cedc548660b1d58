"""Structure engine: run the model once, learn which slices of which tensors belong together."""
