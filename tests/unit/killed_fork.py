"""A process that is killed with signal 9 soon after it has told of its progress so many times."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable

Work = Callable[[Callable[..., None]], object]


def killed_fork(work: Work, after: int, delay: float) -> int:
    """Run ``work(progress)`` in a fork of this process, and return how it ended; -9 is the kill.

    Counted in calls of the progress and not in seconds, so that load decides nothing. Forked, since a fresh process
    takes seconds to import torch, and on a busy machine a minute; the caller sees to it that torch has one thread.

    Args:
        work: what is done, with a progress that is to be handed on.
        after: calls of the progress before the kill.
        delay: seconds from that call to the kill, which so hits any line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that a fork does not take along: there are none that matter
        pid = os.fork()
    if pid == 0:
        calls = 0

        def progress(*_: object) -> None:
            nonlocal calls
            calls += 1
            progress.calls = calls  # type: ignore[attr-defined]
            if calls == after:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

        failed = 1
        try:
            work(progress)
            failed = 0
        finally:
            os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
