"""The tokenizer of a model as GGUF holds it, where llama.cpp has the same one.

llama.cpp splits text by rules that it knows by name. A name is written only where the rules in the model's own
tokenizer.json are those of that name; any other tokenizer is left out and said, since a file whose tokens are nearly
right is worse than one without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from secateur.files import load_json
from secateur.integrations.transformers import tokenizer_folder

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5  # types of tokens in the file
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}
MAX_TOKENIZER = 1 << 27


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their types, merges, and which of them are special.

    Args:
        said: what is in the file, or why nothing is.
        rules: llama.cpp's name of the rules by which text is split; "" = there is no tokenizer.
        tokens: by number.
        types: one per token.
        merges: pairs that belong together, the first first.
        special: word -> number.
        template: of chats.
    """

    said: str
    rules: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: Mapping[str, int] = field(default_factory=dict)
    template: str = ""

    def write(self, writer: GGUFWriter) -> None:
        """Put it into a GGUFWriter."""
        if not self.rules:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rules)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for word, number in self.special.items():
            getattr(writer, f"add_{word}_token_id")(number)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(model: nn.Module, size: int) -> Vocabulary:
    """The tokenizer beside the weights that a model was loaded from.

    Args:
        model: of transformers.
        size: tokens that the model has; its table may be longer than the tokenizer's list.
    """
    folder = tokenizer_folder(model)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return Vocabulary("none: the model was not loaded from a folder with a tokenizer.json")
    told = load_json(folder / "tokenizer.json", max_bytes=MAX_TOKENIZER)
    inner = told.get("model", {}) if isinstance(told, dict) else {}
    rules = rules_of(told.get("pre_tokenizer")) if inner.get("type") == "BPE" else ""
    if not rules or told.get("normalizer") not in (None, {"type": "NFC"}):
        return Vocabulary("none: llama.cpp has no rules that split text as this tokenizer.json does")
    by_number = {number: token for token, number in inner["vocab"].items()}
    types = dict.fromkeys(by_number, NORMAL)
    for each in told.get("added_tokens", []):
        by_number[each["id"]] = each["content"]
        types[each["id"]] = CONTROL if each["special"] else USER
    if max(by_number) >= size:
        return Vocabulary("none: the tokenizer has more tokens than the model")
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    merges = [each if isinstance(each, str) else " ".join(each) for each in inner["merges"]]
    special, template = _settings(folder, {token: number for number, token in by_number.items()})
    said = f"{len(by_number)} tokens, rules {rules!r}"
    return Vocabulary(said, rules, tokens, [types.get(n, UNUSED) for n in range(size)], merges, special, template)


def rules_of(splitting: object) -> str:
    """llama.cpp's name for rules in the form of a tokenizer.json; "" where it has none.

    Example:
        >>> rules_of({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
        'gpt-2'
    """
    if not isinstance(splitting, dict):
        return ""
    steps = splitting.get("pretokenizers", []) if splitting.get("type") == "Sequence" else [splitting]
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        return ""
    by_itself = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and by_itself:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_itself and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_itself and steps[0].get("behavior") == "Isolated":
        pattern = steps[0].get("pattern", {}).get("Regex")
        return {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}.get(pattern, "")
    return ""


def _settings(folder: Path, numbers: Mapping[str, int]) -> tuple[dict[str, int], str]:
    """Special tokens and the template of chats, as the files beside the tokenizer name them."""
    path = folder / "tokenizer_config.json"
    told = load_json(path) if path.is_file() else {}
    told = told if isinstance(told, dict) else {}
    special = {}
    for key, word in _SPECIAL.items():
        token = told.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in numbers:
            special[word] = numbers[token]
    template = folder / "chat_template.jinja"
    found = template.read_text("utf-8") if template.is_file() else told.get("chat_template", "")
    return special, found if isinstance(found, str) else json.dumps(found)
