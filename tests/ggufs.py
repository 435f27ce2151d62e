"""Tiny language models as GGUF files, written by the gguf package's own writer."""

from pathlib import Path

import gguf
import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "f i", "l m"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEXTS = ["the film in 1984 was fine", "a", " odd  spaces\n\nand 3.14, naïve 你好", "<|im_start|>user"]


def tokens() -> list[str]:
    """The bytes, what the merges make of them, and the special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def make_model(kind: str = "llama", seed: int = 0, **settings):
    """A random model of the kind, two layers of 64 columns, whose four query heads share two of keys and values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": len(tokens()), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():  # norms and biases too, or a mistake with them would not show
            torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.2)
    return model


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter has it (conversion/llama.py, permute)."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(file: Path, model, kind: str = "F32", *, tokenizer: bool = True, pre: str = "smollm", names: int = 0) -> Path:
    """The model as llama.cpp's own converter would write it: matrices in ggml's type `kind`, all else in float32."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens())
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    table = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], names or config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        there = table.get_name(name, (".weight", ".bias"))
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = llama_cpp_order(
                weight, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        packed = gguf.quants.quantize(np.ascontiguousarray(weight), stored)
        writer.add_tensor(there, packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
