"""``python -m secateur.criteria`` prints the reference page of all criteria, made from the classes."""

from __future__ import annotations

from secateur.criteria import get, names
from secateur.criteria.docstrings import first_sentence, section

HEAD = """# Criteria

Made from the classes by `python -m secateur.criteria`. A criterion is named in a recipe (`criterion: taylor`, or
`criterion: {name: taylor, reduce: abs}`) or given as an object (`secateur.criteria.Taylor(reduce="abs")`); the
docstring of the class has its formula, its pitfalls and its options. Higher scores are kept.

An epoch is a forward and backward pass over the scoring data. What takes more than five epochs and more than a minute
(`obd`, `kfac`, `gauss-newton`, `integrated`: their passes follow from outputs, probes, units or steps) says before it
begins how many, and how long that is by the first batch; more than twelve hours are refused. What needs more memory
than is free is refused as well, before the work.

Complex weights are scored by what counts both of their parts: {complex}. The others refuse them.

| name | idea | needs | scores | cost | speed | best for | source | options (default) |
|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page as markdown."""
    both = ", ".join(f"`{name}`" for name in names() if get(name).complex_weights)
    return HEAD.replace("{complex}", both) + "".join(_row(name) for name in names())


def _row(name: str) -> str:
    criterion = get(name)
    cells = [
        f"`{criterion.name}`",
        criterion.summary,
        ", ".join(sorted(criterion.needs)) or "nothing",
        ", ".join(criterion.granularities),
        first_sentence(section(type(criterion), "Cost")),
        criterion.speed,
        criterion.best_for,
        section(type(criterion), "Source").removesuffix("."),
        ", ".join(f"`{key}={value!r}`" for key, value in criterion.options().items()),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    print(page(), end="")
