"""How long the words of the command line take that need no torch: the promise is under 0.5 s.

    python benchmarks/cli_startup.py [rounds]

Prints wall time and CPU time per call, medians over so many fresh processes. On a busy machine only the CPU time
says something about the program. Exit code 1 where the median wall time is above the promise.
"""

import resource
import statistics
import subprocess
import sys
import time

CALLS = (["--help"], ["--version"], ["prune", "--help"], ["demo", "--help"], ["recipes", "list"])
LIMIT = 0.5


def once(words: list[str]) -> tuple[float, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "secateur.cli", *words], check=True, capture_output=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    slow = False
    for words in CALLS:
        once(words)  # fills the disk cache and the byte code
        wall, cpu = (statistics.median(times) for times in zip(*(once(words) for _ in range(rounds)), strict=True))
        slow |= wall > LIMIT
        print(f"secateur {' '.join(words):<14} wall {wall:.3f} s, CPU {cpu:.3f} s, {rounds} rounds")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
