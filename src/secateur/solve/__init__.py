"""One-shot updates of weights: what is left takes over for what goes."""
