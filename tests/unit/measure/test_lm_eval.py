"""The adapter for lm-eval, against a stand-in of the two names of the harness that it uses."""

import sys
from types import ModuleType

import pytest
from torch import nn

from secateur.errors import InputError, UnsupportedError
from secateur.measure.lm_eval import lm_eval


@pytest.fixture
def harness(monkeypatch):
    package, models, face = (ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    seen = {}

    class Wrapped:
        def __init__(self, *, pretrained, tokenizer, batch_size, device):
            seen.update(
                model=pretrained, tokenizer=tokenizer, device=device, training=pretrained.training, batch=batch_size
            )

    def simple_evaluate(*, model, tasks, limit, log_samples):
        assert isinstance(model, Wrapped)
        if "unknown" in tasks:
            raise KeyError("unknown")
        figures = {"alias": "x", "acc,none": 0.25 * (limit or 1), "acc_stderr,none": 0.1, "higher": True}
        return {"results": dict.fromkeys(tasks, figures)}

    face.HFLM, package.simple_evaluate = Wrapped, simple_evaluate
    for module in (package, models, face):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_figures_come_back_by_task_and_the_model_as_it_was(harness):
    model, tokenizer = nn.Linear(2, 2).train(), object()
    found = lm_eval(model, tokenizer, ["a", "b"], limit=2)
    assert found == {name: {"acc": 0.5, "acc_stderr": 0.1} for name in ("a", "b")}
    assert harness["model"] is model
    assert harness["tokenizer"] is tokenizer
    assert harness["batch"] == 1, "nothing is padded"
    assert harness["device"] == "cpu"
    assert not harness["training"]
    assert model.training


def test_what_cannot_be_run_is_refused_in_words(harness, monkeypatch):
    with pytest.raises(InputError, match="lm-eval failed on unknown"):
        lm_eval(nn.Linear(2, 2), object(), ["unknown"])
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        lm_eval(nn.Linear(2, 2), None, ["a"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match="needs the package lm-eval") as told:
        lm_eval(nn.Linear(2, 2), object(), ["a"])
    assert "secateur[eval]" in told.value.hint
