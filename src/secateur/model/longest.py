"""How many tokens a model of transformers was made for."""

from __future__ import annotations


def context_length(config: object) -> int | None:
    """Tokens at most; None where the config names no such number."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else None
