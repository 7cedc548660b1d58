"""``python -m secateur.criteria`` prints the reference page of all criteria, made from the classes."""

from __future__ import annotations

from secateur.criteria import get, names
from secateur.criteria.docstrings import first_sentence, section

HEAD = """# Criteria

Made from the classes by `python -m secateur.criteria`. A criterion is named in a recipe (`criterion: taylor`, or
`criterion: {name: taylor, reduce: abs}`) or given as an object (`secateur.criteria.Taylor(reduce="abs")`); the
docstring of the class has its formula, its pitfalls and its options. Higher scores are kept.

| name | idea | needs | scores | cost | speed | best for | source | options (default) |
|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page as markdown."""
    return HEAD + "".join(_row(name) for name in names())


def _row(name: str) -> str:
    rule = get(name)
    cells = [
        f"`{rule.name}`",
        rule.summary,
        ", ".join(sorted(rule.needs)) or "nothing",
        ", ".join(rule.granularities),
        first_sentence(section(type(rule), "Cost")),
        rule.speed,
        rule.best_for,
        section(type(rule), "Source").removesuffix("."),
        ", ".join(f"`{key}={value!r}`" for key, value in rule.options().items()),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    print(page(), end="")
