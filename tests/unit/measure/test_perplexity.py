"""Perplexity against its definition, and the kinds of models and batches that have one."""

import math

import pytest
import torch

from secateur.errors import InputError, UnsupportedError
from secateur.measure import yardstick
from secateur.measure.perplexity import perplexity, predicts_next, require_next, sees_later
from secateur.model.door import Parts

transformers = pytest.importorskip("transformers")


def tiny(cls="LlamaForCausalLM"):
    torch.manual_seed(0)
    if cls == "BertForMaskedLM":
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
    return getattr(transformers, cls)(config).eval()


def batches(count=3):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (2, 9), generator=g)} for _ in range(count)]


def test_it_is_the_exponential_of_the_mean_loss_over_all_predicted_tokens():
    model, data = tiny(), batches()
    losses = []
    with torch.no_grad():
        for batch in data:
            for row in batch["input_ids"]:
                log = model(row[None]).logits[0].double().log_softmax(-1)
                losses += [-float(log[i, row[i + 1]]) for i in range(len(row) - 1)]
    found = perplexity(model, data)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_every_token_counts_once_however_batches_are_cut_and_padding_does_not():
    model, (batch, *_) = tiny(), batches()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    one = perplexity(model, [{"input_ids": ids, "attention_mask": mask}])
    two = perplexity(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :5]}])
    labels = ids.masked_fill(mask == 0, -100)
    three = perplexity(model, [{"input_ids": ids, "labels": labels}])
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-5)


def test_models_that_predict_the_next_token_are_told_by_their_own_loss():
    (batch, *_) = batches()
    labelled = {**batch, "labels": batch["input_ids"]}
    assert predicts_next(tiny(), labelled)
    assert not predicts_next(tiny("BertForMaskedLM"), labelled)
    assert not predicts_next(tiny(), batch)
    assert not predicts_next(tiny(), {**batch, "labels": batch["input_ids"].flip(0)})


@pytest.mark.parametrize(
    ("cls", "names"), [("LlamaForCausalLM", {"loss", "perplexity"}), ("BertForMaskedLM", {"loss"})]
)
def test_the_default_figure_of_a_causal_model_is_its_perplexity(cls, names):
    model, data = tiny(cls), [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    found = yardstick(model, Parts(test=data)).evaluate(model)
    assert set(found) == names
    if "perplexity" in names:
        assert found == pytest.approx(perplexity(model, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_shown_what_it_is_asked_for_has_no_perplexity(dtype):
    """However little it makes of it: nothing that was trained yet hardly looks at its neighbours."""
    batch = {"input_ids": torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(0))}
    assert not sees_later(tiny().to(dtype), batch)
    require_next(tiny().to(dtype), [batch])
    masked = tiny("BertForMaskedLM")
    if dtype == torch.bfloat16:  # rounding to eight bits hides the little, and not what a trained model does
        for name, weight in masked.named_parameters():
            weight.data *= 10.0 if "attention" in name and weight.dim() == 2 else 1.0
    assert sees_later(masked.to(dtype), batch)
    assert not predicts_next(masked, {**batch, "labels": batch["input_ids"]})
    with pytest.raises(UnsupportedError, match="BertForMaskedLM does not predict the next token"):
        require_next(masked, [batch])


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_hide_that_a_model_sees_later_tokens(left):
    ids, mask = torch.arange(1, 13)[None] % 50, torch.ones(1, 12, dtype=torch.long)
    mask[:, :4] = 0
    mask = mask if left else mask.flip(1)
    batch = {"input_ids": ids, "attention_mask": mask}
    assert sees_later(tiny("BertForMaskedLM"), batch)
    assert not sees_later(tiny(), batch)


def test_without_a_token_to_predict_there_is_no_perplexity():
    with pytest.raises(InputError, match="no token"):
        perplexity(tiny(), [{"input_ids": torch.zeros(1, 1, dtype=torch.int64)}])
    with pytest.raises(InputError, match="input_ids"):
        perplexity(tiny(), [torch.zeros(1, 4)])
