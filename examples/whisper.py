"""A Whisper-like model: half of its decoder's layers and some hidden units go; from_pretrained loads what is left.

python examples/whisper.py
"""

import tempfile

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import secateur as sc


def main(layers: int = 4, width: int = 64) -> tuple[int, int, float]:
    """Return the decoder layers and hidden units that are left, and the share of the parameters."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200,
        d_model=width,
        encoder_layers=2,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    sound = torch.randn(2, 16, 100)  # log-mel frames of two recordings
    example = {"input_features": sound, "decoder_input_ids": torch.randint(3, 200, (2, 6))}

    # Few decoder layers are what makes such a model fast: every token passes through all of them.
    shallow = sc.plan(
        model,
        example,
        granularity="layer",
        criterion="block-influence",
        data=[example],
        target={"sparsity": {"model.decoder.*": 0.5, "*": 0.0}},
        expressible=True,
    ).apply(model)
    small = sc.plan(shallow, example, granularity="neuron", target={"params": 0.8}, expressible=True).apply(shallow)

    folder = tempfile.mkdtemp() + "/whisper"
    small.save_pretrained(folder)
    again = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    told = [net.generate(sound, max_new_tokens=8, do_sample=False) for net in (small, again)]
    assert torch.equal(*told)
    share = small.num_parameters() / model.num_parameters()
    print(f"{again.config.decoder_layers} decoder layers, {again.config.decoder_ffn_dim} hidden units, {share:.0%}")
    return again.config.decoder_layers, again.config.decoder_ffn_dim, share


if __name__ == "__main__":
    main()
