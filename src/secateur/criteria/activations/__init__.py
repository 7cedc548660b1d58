"""Criteria that look at activations: what units give, and what the next layer can do without them."""
