"""ModelSpec from the metadata of a GGUF file and, for what that leaves out, its tensor table."""

from __future__ import annotations

from .failures import corrupt, unsupported
from .gguf import GgufArray, GgufFile
from .model_spec import MAX_SIZE, ModelSpec, RopeKind, RopeSpec, checked
from .tensors import FloatName

# The families that models/ implements, by general.architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
_DTYPES: dict[str, FloatName] = {"f32": "float32", "f16": "float16"}
_ROPE_KINDS: dict[str, RopeKind] = {"none": "default", "linear": "linear", "yarn": "yarn"}


def spec_of_gguf(file: GgufFile) -> ModelSpec:
    """Raises StartupError: HS-E022 for a missing or senseless key, HS-E023 for a model that cannot be run."""
    architecture = file.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise unsupported(
            f"{file.path.name} holds a model of architecture {architecture!r}",
            f"there is no implementation of it; there is one of {', '.join(ARCHITECTURES)}",
            "use a model of one of these architectures",
        )

    def size(key: str, default: int | None = None) -> int:
        value = file.integer(f"{architecture}.{key}", default)
        if not 0 < value <= MAX_SIZE:
            raise corrupt(file.path, f"key {architecture}.{key!r} is {value}, expected 1 to {MAX_SIZE}")
        return value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise corrupt(file.path, "tensor 'token_embd.weight' is missing or not a matrix")
    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // heads)
    if size("attention.value_length", head_dim) != head_dim or size("rope.dimension_count", head_dim) != head_dim:
        raise unsupported(
            f"{file.path.name} rotates part of a head, or has keys and values of different length",
            f"{architecture}.rope.dimension_count or .attention.value_length differ from the head's {head_dim}",
            "use another model",
        )
    spec = ModelSpec(
        family=ARCHITECTURES[architecture],
        hidden_size=hidden,
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=size("feed_forward_length"),
        vocab_size=embedding.shape[0],
        rms_norm_eps=file.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        max_position=size("context_length"),
        rope=_rope_of_gguf(file, architecture, size("context_length"), head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        sliding_window=file.integer(f"{architecture}.attention.sliding_window", 0),
        eos_token_ids=_eos_of_gguf(file),
        dtype=_DTYPES.get(embedding.type, "bfloat16"),
    )
    return checked(spec, file.path)


def _rope_of_gguf(file: GgufFile, architecture: str, context: int, head_dim: int) -> RopeSpec:
    theta = file.number(f"{architecture}.rope.freq_base", 10000.0)
    if divisors := file.tensors.get("rope_freqs.weight"):
        if divisors.type != "f32" or divisors.shape != (head_dim // 2,):
            raise corrupt(file.path, f"tensor 'rope_freqs.weight' is {divisors.type} {divisors.shape}")
        return RopeSpec(theta=theta, kind="factors", factors=tuple(file.bytes_of(divisors).view("<f4").tolist()))
    name = file.string(f"{architecture}.rope.scaling.type", "none")
    kind = _ROPE_KINDS.get(name)
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind is None:
        raise unsupported(
            f"{file.path.name} asks for rotary scaling {name!r}", "linear and yarn are there", "use another model"
        )
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=file.number(f"{architecture}.rope.scaling.factor"),
        original_max_position=file.integer(f"{architecture}.rope.scaling.original_context_length", context),
    )


def _eos_of_gguf(file: GgufFile) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in file.metadata and (value := file.integer(key)) not in found:
            found.append(value)
    return tuple(found)


def vocabulary_size(file: GgufFile) -> int:
    """Number of entries of the tokenizer's vocabulary; 0 if the file has none."""
    tokens = file.array("tokenizer.ggml.tokens")
    return tokens.length if isinstance(tokens, GgufArray) else 0
