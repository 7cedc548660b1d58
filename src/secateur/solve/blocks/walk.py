"""A forward pass that stops in front of products, so that many batches go through a block in step.

All batches wait in front of a weight until it is solved, then all go on with its new values. So one pass through a
block is enough for all of its layers, and each is solved on what the solved layers before it really hand on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn

from secateur.solve.blocks.products import Products, Use


class _CancelledError(BaseException):
    """Ends the forward of a walk that nobody waits for any more; no handler of a model's code catches it."""


class Walk:
    """One forward pass in a thread of its own; never more than one of all walks runs at a time.

    Args:
        run: the forward pass.
        parameters: products with these may be stopped at.
        wanted: whether to stop in front of a product.
    """

    def __init__(
        self, run: Callable[[], object], parameters: Mapping[str, nn.Parameter], wanted: Callable[[Use], bool]
    ) -> None:
        self.stop: Use | None = None
        self.output: object = None
        self._run, self._wanted = run, wanted
        self._products = Products(parameters, self._visit)
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._begun = False

    def advance(self) -> Use | None:
        """Go on to the next product that is wanted.

        Returns:
            it, or None where the pass is over; `output` then holds what the forward returned.

        Raises:
            whatever the forward raises.
        """
        if not self._begun:
            self._begun = True
            self._thread.start()
        elif self._thread.is_alive():
            self._go.release()
        else:
            return None
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.stop

    def cancel(self) -> None:
        """End the pass where it stands."""
        if self._begun and self._thread.is_alive():
            self._cancelled = True
            self._go.release()
            self._thread.join()

    def _main(self) -> None:
        try:
            # What torch remembers per thread has to be said again here.
            with torch.no_grad(), self._products:
                self.output = self._run()
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.stop = None
            self._back.release()

    def _visit(self, use: Use) -> None:
        if not self._wanted(use):
            return
        self.stop = use
        self._back.release()
        self._go.acquire()
        self.stop = None
        if self._cancelled:
            raise _CancelledError
