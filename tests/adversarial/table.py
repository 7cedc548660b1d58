"""Prints how every family ended: ``python -m tests.adversarial.table [PATTERN]`` from the root of the repository."""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch

from . import families
from .harness import GOOD, ORDER, judge, needless


def main(pattern: str = "") -> int:
    torch.set_num_threads(1)
    cases = {name: case for name, case in families.all_cases().items() if pattern in name}
    counts: dict[str, Counter[str]] = {}
    bad, refusals, slow = [], [], []
    for name, case in cases.items():
        start = time.perf_counter()
        verdict, tries = judge(case)
        slow.append((time.perf_counter() - start, name))
        counts.setdefault(case.family, Counter())[verdict.outcome] += 1
        if verdict.outcome not in GOOD:
            bad.append((verdict.outcome, f"{name} ({verdict.kind}): {verdict.why[:300]}"))
        refusals += [f"{name} ({v.kind}): {v.outcome}: {v.why[:260]}" for v in needless(case, tries)]
    print("family".ljust(16), *(o.rjust(14) for o in ORDER))
    for family, counter in sorted(counts.items()):
        print(family.ljust(16), *(str(counter[o] or "").rjust(14) for o in ORDER))
    total = sum(counts.values(), Counter())
    print("all".ljust(16), *(str(total[o] or "").rjust(14) for o in ORDER), f"  of {len(cases)}")
    for title, lines in (("wrong", [f"{o}: {t}" for o, t in sorted(bad)]), ("needless refusals", refusals)):
        print(f"\n{title}: {len(lines)}", *lines, sep="\n  ")
    print(f"\n{sum(s for s, _ in slow):.0f} s; slowest:", *(f"{n} {s:.2f}" for s, n in sorted(slow)[-5:]))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
