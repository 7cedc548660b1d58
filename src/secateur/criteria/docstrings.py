"""What a criterion's docstring says about it: its cost and its source are written there, and nowhere else."""

from __future__ import annotations

import inspect
import re

SECTION = r"^{title}:[ \t]*\n?(?P<text>.*?)(?=^\S|\Z)"


def section(cls: type, title: str) -> str:
    r"""The text of a section of a class's docstring, in one line; "" where there is no such section.

    Args:
        cls: any class; a section that its docstring has not is taken from that of a base.
        title: name of the section, for example "Cost".

    Example:
        >>> class Sample:
        ...     '''One line.
        ...
        ...     Cost:
        ...         One pass over
        ...         the weights. No data.
        ...     '''
        >>> section(Sample, "Cost")
        'One pass over the weights. No data.'
    """
    for base in cls.__mro__:  # a variant of a criterion need not say again what it costs
        doc = inspect.cleandoc(base.__doc__ or "")
        found = re.search(SECTION.format(title=title), doc, re.DOTALL | re.MULTILINE)
        if found:
            return " ".join(found["text"].split())
    return ""


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, without it.

    Example:
        >>> first_sentence("As in Li et al. 2017, one pass. No data.")
        'As in Li et al. 2017, one pass'
    """
    # A capital has to follow: "et al. 2017" and "section 3.2" end no sentence.
    return re.split(r"\.(?:\s+(?=[A-Z])|$)", text, maxsplit=1)[0]
