"""How a model is called, what its tensors are called, and what stays whole."""
