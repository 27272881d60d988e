#!/usr/bin/env python3
"""Writes a model folder with random weights in a real model's shape, to measure loading and the whole server with.

    python benchmarks/random_model.py CONFIG.json OUT [--device cuda]

Weights N(0, 0.02) as safetensors shards of 2 GB in the type of CONFIG.json; a tokenizer that spells every id, with a
plain chat template. Needs safetensors and tokenizers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.models import family_of
from hybrid_serve.models.names import expected_tensors
from hybrid_serve.models.weights import DTYPES, DummyWeights

SHARD_BYTES = 2 * 10**9
END = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def write_weights(folder: Path, device: torch.device) -> None:
    spec = spec_of_folder(folder)
    weights, dtype = DummyWeights(0, device), DTYPES[spec.dtype]
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in expected_tensors(spec, family_of(spec)):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        weights.fill(tensor, name)
        shard[name] = tensor.cpu()
        if sum(part.nbytes for part in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE: bytes, pairs of letters, then pairs of pairs, until every id has a spelling."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = string.ascii_lowercase
    pairs = list(itertools.product(letters, letters))
    quads = ((f"{a}{b}", f"{c}{d}") for (a, b), (c, d) in itertools.product(pairs, pairs))
    merges = list(itertools.islice(itertools.chain(pairs, quads), max(vocab_size - 1 - len(alphabet), 0)))
    entries = [END, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={entry: id_ for id_, entry in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    shutil.copy(args.config, args.out / "config.json")
    write_weights(args.out, args.device)
    write_tokenizer(args.out, spec_of_folder(args.out).vocab_size)


if __name__ == "__main__":
    main()
