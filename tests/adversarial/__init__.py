"""Small models made to deceive a structured pruner, each with a truth that does not come from the engine."""
