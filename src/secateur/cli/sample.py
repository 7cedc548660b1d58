"""What a language model writes, before and after, for the report of a command."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.cli.job import Job
    from secateur.result import Result


@runtime_checkable
class Decodes(Protocol):
    """A tokenizer that turns token numbers back into text."""

    def decode(self, token_ids: list[int]) -> str:
        """The text."""


def with_sample(work: Job, result: Result) -> Result:
    """The result, with a sample in its report where model, data and tokenizer can give one.

    A model that breaks off while it writes loses nobody the run: the report says why there is no sample.
    """
    from secateur.measure.continuation import PROMPT, continuation
    from secateur.report.record import Sample

    tokenizer, prompt = work.source.tokenizer, _prompt(work, PROMPT)
    if prompt is None or not isinstance(tokenizer, Decodes) or "perplexity" not in result.report.after.quality:
        return result
    try:
        written = [continuation(model, prompt) for model in (work.model, result.model)]
    except Exception as error:  # the code is the model's own
        why = f"no sample of what it writes: generate() failed with {type(error).__name__}: {error}"
        warnings = (*result.report.warnings, why)
        return replace(result, report=result.report.model_copy(update={"warnings": warnings}))
    if written[0] is None or written[1] is None:
        return result
    texts = [tokenizer.decode(tokens.tolist()) for tokens in (prompt, written[0], written[1])]
    sample = Sample(prompt=texts[0], before=texts[1], after=texts[2])
    return replace(result, report=result.report.model_copy(update={"sample": sample}))


def _prompt(work: Job, length: int) -> Tensor | None:
    """A piece of the test part, where it is blocks of tokens."""
    from secateur.sources.text import TokenData

    test = None if work.data is None else work.data.test
    if not isinstance(test, TokenData):
        return None
    # Out of the middle: the beginning of a text is mostly a title, and models of fixed length need room to go on.
    middle = test.blocks.shape[1] // 2
    return test.blocks[0, max(middle - length, 0) : middle]
