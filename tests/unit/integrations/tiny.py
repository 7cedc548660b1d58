"""Tiny random Hugging Face models, built offline."""

import torch

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {**TEXT, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
VIT = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 72, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
GEMMA = {**LLAMA, "sliding_window": 4}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [2, 4], "window_size": 4}

KINDS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama_tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "bert": ("BertModel", BERT),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "vit": ("ViTForImageClassification", VIT),
    "bart": ("BartForConditionalGeneration", BART),
    "t5": ("T5ForConditionalGeneration", T5),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "swin": ("SwinForImageClassification", SWIN),
}


def build(kind: str, seed: int = 0):
    """The model and an example of its inputs; weights large enough that every part of it shows in the outputs."""
    import transformers

    name, options = KINDS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "swin"):
        return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    return model, {"input_ids": ids, "decoder_input_ids": ids} if kind in ("bart", "t5") else {"input_ids": ids}


def outputs_of(model, example):
    from secateur.model.call import outputs

    with torch.no_grad():
        return outputs(model.eval()(**example))


def largest_difference(a, b, example):
    pairs = zip(outputs_of(a, example), outputs_of(b, example), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)
