"""Text as data for language models: fixed blocks of token numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.files.sniff import open_regular
from secateur.sources.in_memory import SET_ASIDE, DataSet
from secateur.sources.prose import NAME, prose

TOKENS, SEQUENCES = 128, 32
_TRAIN, _TEST = ("train.txt", "valid.txt", "validation.txt"), ("test.txt",)


SHORTER = "blocks of {longest} tokens, not {tokens}: the model was made for no more"


class Tokenizer(Protocol):
    """What turns text into token numbers, as the tokenizers of transformers do."""

    def __call__(self, text: str, /) -> Mapping[str, Sequence[int]]:
        """``{"input_ids": token numbers, ...}``."""


def block_length(tokens: int, longest: int | None) -> tuple[int, tuple[str, ...]]:
    """How long blocks are, and what is to be said of it.

    Beyond what a model was made for learned positions end, and rotary ones go on to angles that it has never seen.

    Args:
        tokens: as long as they were asked for.
        longest: as `secateur.model.longest.context_length` gives it.

    Example:
        >>> block_length(1024, 256)
        (256, ('blocks of 256 tokens, not 1024: the model was made for no more',))
    """
    if longest is None or tokens <= longest:
        return tokens, ()
    return longest, (SHORTER.format(longest=longest, tokens=tokens),)


class TokenData:
    """Batches ``{"input_ids", "labels"}`` of equal blocks; the model shifts the labels itself.

    Args:
        blocks: int64 ``[samples, tokens]``.
        batch_size: samples per batch.

    Raises:
        InputError: there is no block.
        RecipeError: batch size below 1.
    """

    def __init__(self, blocks: Tensor, *, batch_size: int = 8) -> None:
        if len(blocks) == 0:
            raise InputError("there is no block of tokens in the data", hint="give more text")
        if batch_size < 1:
            raise RecipeError(f"the batch size is {batch_size}", hint="give at least 1")
        self.blocks, self.batch_size = blocks, batch_size

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.blocks), self.batch_size):
            block = self.blocks[start : start + self.batch_size]
            # The same tokens: a causal model shifts its labels by one itself.
            yield {"input_ids": block, "labels": block}


def load_text(
    path: str | Path,
    *,
    tokenizer: Tokenizer | None,
    batch_size: int = 8,
    tokens: int = TOKENS,
    calibration: int = SEQUENCES,
    test: int | None = None,
) -> DataSet:
    """Read text, turn it into tokens at one go, and cut it into blocks; the rest at the end is dropped.

    Args:
        path: a file (its last fifth becomes the test part) or a folder with ``train.txt`` or ``valid.txt``,
            and ``test.txt``.
        tokenizer: ``tokenizer(text)["input_ids"]`` gives token numbers; None is refused.
        batch_size: blocks per batch.
        tokens: tokens per block.
        calibration: blocks for calibration, the first ones.
        test: blocks of the test part at most, the first ones; None: all.

    Raises:
        UnsupportedError: no tokenizer.
        InputError: no file, no UTF-8, or less text than one block.
    """
    if tokenizer is None:
        raise _no_tokenizer(f"text:{path}")
    path = Path(path)
    train_file = _first(path, _TRAIN) if path.is_dir() else path
    test_file = _first(path, _TEST) if path.is_dir() else None
    train = _blocks(train_file, tokenizer, tokens)
    notes: tuple[str, ...] = ()
    if test_file is not None:
        held = _blocks(test_file, tokenizer, tokens)
    else:
        cut = len(train) - len(train) // 5
        train, held = train[:cut], train[cut:]
        # The end of a text and not blocks of all of it: neighbours of a block that was trained on give it away.
        notes = (SET_ASIDE.format(name=f"text:{path}", share="the last fifth of the text"),) if len(held) else ()
    return _data_set(f"text:{path}", train, held[:test], batch_size, calibration, notes)


def load_prose(
    *,
    tokenizer: Tokenizer | None,
    batch_size: int = 8,
    tokens: int = TOKENS,
    calibration: int = SEQUENCES,
    test: int | None = None,
) -> DataSet:
    """The texts of Python's own reference, as `load_text` gives those of a folder; see there.

    Raises:
        UnsupportedError: no tokenizer.
    """
    if tokenizer is None:
        raise _no_tokenizer(NAME)
    train, held = (_cut(text, tokenizer, tokens, NAME) for text in prose())
    return _data_set(NAME, train, held[:test], batch_size, calibration, ())


def _data_set(
    name: str, train: Tensor, held: Tensor, batch_size: int, calibration: int, notes: tuple[str, ...]
) -> DataSet:
    return DataSet(
        name=name,
        train=TokenData(train, batch_size=batch_size),
        calibration=TokenData(train[:calibration], batch_size=batch_size),
        test=TokenData(held, batch_size=batch_size) if len(held) else None,
        example={"input_ids": train[:1]},
        notes=notes,
    )


def whole_text(word: str, tokenizer: Tokenizer | None, *, tokens: int, most: int | None = None) -> TokenData:
    """All of a text (of a folder its test part) as blocks of tokens, one per batch.

    Args:
        word: ``text:`` and a file, or a folder with ``test.txt``; or ``demo:prose``.
        tokenizer: as for `load_text`.
        tokens: per block.
        most: blocks at most, the first ones.

    Raises:
        UnsupportedError: no tokenizer.
        InputError: no file, no UTF-8, or less text than one block.
    """
    if tokenizer is None:
        raise _no_tokenizer(word)
    path = Path(word.removeprefix("text:"))
    if word == NAME:
        blocks = _cut(prose()[1], tokenizer, tokens, NAME)
    else:
        blocks = _blocks(_first(path, _TEST) if path.is_dir() else path, tokenizer, tokens)
    return TokenData(blocks[:most], batch_size=1)


def _no_tokenizer(word: str) -> UnsupportedError:
    return UnsupportedError(
        f"{word} needs a tokenizer, and the model brings none",
        hint="text is for hf: models whose folder has a tokenizer; give token numbers as npz: otherwise",
    )


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has none of {', '.join(names)}")


def _blocks(path: Path, tokenizer: Tokenizer, tokens: int) -> Tensor:
    try:
        with open_regular(path) as stream:
            text = stream.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text", why=str(error)) from error
    return _cut(text, tokenizer, tokens, str(path))


def _cut(text: str, tokenizer: Tokenizer, tokens: int, name: str) -> Tensor:
    # The whole text at once: given line by line, a tokenizer would add its marks of beginning and end to each.
    numbers = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    count = len(numbers) // tokens
    if count == 0:
        raise InputError(
            f"{name} holds {len(numbers)} tokens, less than one block of {tokens}",
            hint="give more text, or shorter blocks: --set calibration.tokens=N, or --tokens N of measure",
        )
    return numbers[: count * tokens].reshape(count, tokens)
