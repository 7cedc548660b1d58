"""At most this loss, in words: what was found, what the test part says of it, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.report.bound import Limit, Measured
from secateur.report.safe_text import clean, percent, seconds, significant

_VERDICTS = {
    "sure": "kept on the test part, the bound too",
    "held": "kept on the test part, but not surely: its bound lies above the limit",
    "missed": "NOT kept on the test part",
    "unconfirmed": "not confirmed: there is no test part",
}
UNCONFIRMED = ("what the model loses was not confirmed", "there is no test part that nothing was chosen by")


def limit_words(limit: Limit) -> str:
    """The limit, the amount that was found for it, and whether it is kept: one sentence without a final stop."""
    asked = f"at most {limit.max_drop:g} {limit.unit} of {clean(limit.figure)}"
    found = f"{clean(limit.smallest)} {significant(limit.amount)}, chosen from {len(limit.attempts)} attempts"
    return f"{asked}: {_VERDICTS[limit.verdict]} ({found})"


def limit_lines(limit: Limit) -> Iterator[str]:
    """The sentence, the two measurements, and one line for every attempt."""
    yield limit_words(limit)
    yield f"on {clean(limit.chosen_by)}: {_measured(limit, limit.chosen)}"
    if limit.test is not None:
        yield f"on the test part, read once: {_measured(limit, limit.test)}"
    for one in limit.attempts:
        shares = [f"{name} {percent(value)}" for name, value in (("macs", one.macs), ("params", one.params)) if value]
        if one.nonzero is not None and one.params is not None and one.nonzero < one.params:
            shares.append(f"non-zero {percent(one.nonzero)}")
        lost = clean(one.why)
        if one.drop is not None:
            bound = "" if one.high is None else f", at most {one.high:.2f}"
            lost = f"lost {one.drop:.2f}{bound}"
        mark = "kept" if one.kept else "not kept"
        left = f" ({', '.join(shares)} left)" if shares else ""
        yield f"tried {clean(limit.smallest)} {significant(one.amount)}{left}: {lost}: {mark}, {seconds(one.seconds)}"


def _measured(limit: Limit, found: Measured) -> str:
    said = f"lost {found.drop:.2f} {limit.unit}"
    if found.low is not None and found.high is not None:
        sure = f"{limit.confidence:.0%} confidence each"
        said += f", at least {found.low:.2f} and at most {found.high:.2f} with {sure}"
    return f"{said} ({clean(found.method)})"
