"""English that lies on every machine with Python: the texts of its language reference, which ``help()`` shows."""

from __future__ import annotations

import pydoc_data.topics

NAME = "demo:prose"
TEST = 5  # the last fifth


def prose() -> tuple[str, str]:
    """The text to calibrate with, and the text to measure with, which holds nothing of the first.

    Topics quote each other at length, so every paragraph is taken once. Another version of Python has another text:
    figures compare within one.

    Example:
        >>> learn, test = prose()
        >>> len(learn) > 3 * len(test) > 10_000
        True
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    paragraphs = [part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n")]
    unique = list(dict.fromkeys(part for part in paragraphs if part.strip()))
    cut = len(unique) - len(unique) // TEST
    return "\n\n".join(unique[:cut]), "\n\n".join(unique[cut:])
