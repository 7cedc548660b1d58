"""Numbers every call that changes the disk and makes one of them, or all from it on, fail."""

from __future__ import annotations

import errno
import os

from secateur.files import disk

OPERATIONS = ("create", "make_folder", "write", "fsync", "rename", "rename_new", "exchange")


class FaultyDisk:
    """Replaces the calls of ``secateur.files.disk`` for one test."""

    def __init__(self, monkeypatch, *, fail_at=None, code=errno.EIO, forever=False, after=False) -> None:
        self.count = 0
        self.fail_at, self.code, self.forever, self.after = fail_at, code, forever, after
        for name in OPERATIONS:
            monkeypatch.setattr(disk, name, self._wrap(getattr(disk, name)))

    def _wrap(self, real):
        def call(*args):
            number = self.count
            self.count += 1
            hit = self.fail_at is not None and (number >= self.fail_at if self.forever else number == self.fail_at)
            if hit and not self.after:
                raise OSError(self.code, os.strerror(self.code))
            result = real(*args)
            if hit:
                # An interrupt that arrives right after the system did its work.
                raise KeyboardInterrupt
            return result

        return call
