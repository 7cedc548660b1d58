"""Transformers architectures, saved after their cut, load in a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers_zoo
from fresh import load_all_elsewhere, main

FAST = ["LlamaForCausalLM"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_architectures_load_in_a_fresh_process(tmp_path: Path) -> None:
    assert load_all_elsewhere(FAST, transformers_zoo.build, tmp_path, __file__) == len(FAST)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_all_architectures_load_in_a_fresh_process(tmp_path: Path) -> None:
    names = [name for name in transformers_zoo.CASES if name not in FAST]
    assert load_all_elsewhere(names, transformers_zoo.build, tmp_path, __file__) >= 0.95 * len(names)


if __name__ == "__main__":
    main(transformers_zoo.build)
