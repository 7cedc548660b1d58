"""Many conditions are said under headings, and every one of them is said."""

from __future__ import annotations

import re

import pytest
import torch

import secateur as sc
from secateur.structure.grouped import FEW, grouped
from secateur.types import Condition

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(vocab_size=99, **SIZES)
    return transformers.BertModel(config), {"input_ids": torch.randint(0, 99, (2, 12))}


def vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("make", [bert, vit])
def test_every_condition_of_a_library_model_is_said_with_its_lines_in_few_lines(make: object) -> None:
    torch.manual_seed(0)
    model, example = make()  # type: ignore[operator]
    plan = sc.plan(model.eval(), example, target={"sparsity": 0.3})
    assert len(plan.conditions) > FEW
    said = plan.explain().split("conditions:\n")[1]
    for condition in plan.conditions:
        name, _, line = condition.where.rpartition(":")
        (names,) = re.findall(r"^  .*\b" + re.escape(name) + r".*\b" + line + r"\b.*$", said, re.M)[:1] or [""]
        assert names, condition
        core = re.split(r", its default|, by which|; the other|; \d+ more|, as on|: lines| as it was", condition.text)[
            0
        ]
        core = re.sub(r"^holds (with defaults for|for|with|where) ", "", core)
        assert core in said or condition.text.split("lines ")[-1].split(";")[0] in said, condition
    assert len([line for line in said.splitlines() if line.startswith("    ")]) < len(plan.conditions)
    assert all(len(line) <= 400 for line in said.splitlines())


def test_few_conditions_stand_as_they_are() -> None:
    found = [Condition(f"holds for n={n}, its default, by which the code decides", f"a.py:{n}") for n in range(FEW)]
    assert grouped(found) == [str(condition) for condition in found]


def test_conditions_from_anywhere_are_kept_whole_where_they_are_of_no_known_kind() -> None:
    found = [Condition(f"a sentence {n}", "file.py:7" if n % 2 else "") for n in range(FEW + 3)]
    found += [Condition("holds where 3 decisions of <x> go as on the example: lines 1, 2, 3; the other ways", "")]
    found += [Condition("holds for k=1, its default, by which the code decides; 4 more such lines are left out", "a:3")]
    lines = grouped(found)
    assert all(any(f"a sentence {n}" in line for line in lines) for n in range(FEW + 3))
    assert sum("file.py:7" in line for line in lines) == (FEW + 3) // 2
    assert "    k=1 (a:3, 4 more)" in [f"  {line}" for line in lines]
    assert any("<x>: lines 1, 2, 3" in line for line in lines)
