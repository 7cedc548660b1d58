"""Plan and model in, pruned model out: masks, cuts, replay and verification."""
