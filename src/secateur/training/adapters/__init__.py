"""Training loops of others: transformers, Lightning. Each file imports its library, and only when it is imported."""
