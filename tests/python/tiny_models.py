"""Tiny random models on disk: config.json, weights, tokenizer, chat template; made without torch, in milliseconds.

Weights are large enough (N(0, 0.2)) that logits differ clearly: a wrong row or position changes the output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
EOS_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def make_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A model folder of 2 layers, hidden size 64, 512 tokens, in float32. ``overrides`` replace keys of config.json
    (``hidden_size=128``, ``tie_word_embeddings=True``, ``rope_scaling={...}``). Returns ``folder``, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family) | overrides
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
    save_file(tiny_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def tiny_config(family: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64 if family == "qwen3" else 16,
        "intermediate_size": 96,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": family in ("qwen2", "qwen3"),
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
    }
    if family == "mistral":
        config["sliding_window"] = None
    return config


def tiny_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the checkpoint, by its Hugging Face name."""
    random = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    family = config["model_type"]
    has_qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    has_output_bias = config.get("attention_bias", False)
    tensors: dict[str, NDArray[np.float32]] = {}

    def matrix(name: str, rows: int, width: int, has_bias: bool = False) -> None:
        tensors[f"{name}.weight"] = random.normal(0, 0.2, (rows, width)).astype(np.float32)
        if has_bias:
            tensors[f"{name}.bias"] = random.normal(0, 0.2, rows).astype(np.float32)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = random.uniform(0.5, 1.5, size).astype(np.float32)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm", hidden)
        matrix(f"{layer}.self_attn.q_proj", q_rows, hidden, has_qkv_bias)
        matrix(f"{layer}.self_attn.k_proj", kv_rows, hidden, has_qkv_bias)
        matrix(f"{layer}.self_attn.v_proj", kv_rows, hidden, has_qkv_bias)
        matrix(f"{layer}.self_attn.o_proj", hidden, q_rows, has_output_bias)
        if family == "qwen3":
            norm(f"{layer}.self_attn.q_norm", dim)
            norm(f"{layer}.self_attn.k_norm", dim)
        norm(f"{layer}.post_attention_layernorm", hidden)
        has_mlp_bias = family == "llama" and config.get("mlp_bias", False)
        matrix(f"{layer}.mlp.gate_proj", inner, hidden, has_mlp_bias)
        matrix(f"{layer}.mlp.up_proj", inner, hidden, has_mlp_bias)
        matrix(f"{layer}.mlp.down_proj", hidden, inner, has_mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json (byte-level BPE: any text round-trips) and tokenizer_config.json with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    consonants, vowels, space = "bcdfghjklmnpqrstvwxyz", "aeiou", "\u0120"
    pairs = [(c, v) for c in consonants for v in vowels] + [(v, c) for v in vowels for c in consonants]
    pairs += [(space, letter) for letter in sorted(consonants + vowels)] + [(c, c) for c in consonants]
    merges = pairs[: VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    entries = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "unk_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
