"""Flags, environment and file: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_serve.cli.options import help_text, parse, stray_variables
from hybrid_serve.cli.settings import settings
from hybrid_serve.cli.usage import UsageError
from hybrid_serve.cli.vllm_flags import NOT_SUPPORTED, why_not

KEY = "canary-7b1f"


def refusal(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv, environ or {})
    return str(caught.value)


def in_file(tmp_path: Path, text: str | bytes) -> str:
    """What a file with this text is refused with; ``F`` stands for its path."""
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return refusal(["--config", str(file)]).replace(str(file), "F")


def test_the_model_is_positional_and_beats_the_flag() -> None:
    """S2."""
    options = parse(["tiny", "--model", "other"], {"HYBRID_SERVE_MODEL": "third"})
    assert options.config.model.model == "tiny"
    assert options.origins == {"model": "MODEL"}


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_a_flag_of_vllm_that_we_lack_is_named(name: str) -> None:
    """Decision 14: never silently."""
    hint = f" ({why_not(name)})" if why_not(name) else ""
    assert refusal([f"--{name}", "1"]) == f"not supported: --{name}{hint}"
    assert refusal([f"--no-{name.replace('-', '_')}"]) == f"not supported: --no-{name}{hint}"


def test_short_and_dotted_flags_of_vllm_are_named_too(tmp_path: Path) -> None:
    assert refusal(["m", "-tp", "2"]) == "not supported: -tp"
    assert refusal(["--compilation-config.level=3"]) == "not supported: --compilation-config.level"
    assert in_file(tmp_path, "tensor-parallel-size: 2\n") == "F:1: not supported: tensor_parallel_size"


def test_an_unknown_flag_names_the_nearest() -> None:
    assert refusal(["--max-num-seq", "3"]).startswith("unknown option --max-num-seq; did you mean --max-num-seqs")
    assert refusal(["--qqqq"]) == "unknown option --qqqq"


def test_no_flag_can_be_abbreviated() -> None:
    """An abbreviation would change its meaning when an option is added."""
    assert refusal(["--serv", "x"]).startswith("unknown option --serv")


def test_a_second_model_is_refused() -> None:
    assert "unexpected argument 'b'" in refusal(["a", "b"])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12345", 12345),
        ("2GiB", 2**31),
        ("512MB", 512_000_000),
        ("1.5 gib", 3 * 2**29),
        ("4k", 4000),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_written_with_units(text: str, size: int) -> None:
    assert parse(["--kv-cache-memory-bytes", text], {}).config.cache.kv_cache_memory_bytes == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2XB", "2GiB/s", "1e9", "٣GiB "])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert "is not a size such as 2GiB" in refusal([f"--kv-cache-memory-bytes={text}"])


@pytest.mark.parametrize("text", ["auto", "-1", "0"])
def test_a_length_can_be_left_to_the_server(text: str) -> None:
    assert parse(["--max-model-len", text], {}).config.model.max_model_len == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "http"], "--port: 'http' is not a whole number"),
        (["--port", "80.5"], "--port: '80.5' is not a whole number"),
        (["--port", "70000"], "--port is 70000, must be 0 to 65535"),
        (["--max-model-len", "long"], "--max-model-len: 'long' is not a whole number or auto"),
        (["--shutdown-timeout", "soon"], "--shutdown-timeout: 'soon' is not a number"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout is nan, must be 0 to 86400"),
        (["--dtype", "int3"], "--dtype: 'int3' is not one of auto, float32, bfloat16, float16"),
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype: 'fp8_e5m2' is not one of auto, fp8, fp8_e4m3"),
        (["--block-size", "17"], "--block-size is 17, must be 16, 32 or 64"),
        (["--port"], "argument --port: expected 1 argument"),
        (["--api-key", ""], "--api-key has an empty key, which would let everyone in"),
    ],
)
def test_a_wrong_value_is_one_clear_line(argv: list[str], message: str) -> None:
    assert refusal(argv) == message


def test_every_wrong_value_is_named_at_its_own_place(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("block_size: 8\n")
    lines = refusal(["--port=-1", "--config", str(file)], {"HYBRID_SERVE_MAX_NUM_SEQS": "-2"}).splitlines()
    assert sorted(lines) == [
        "--port is -1, must be 0 to 65535",
        f"{file}:1: block_size is 8, must be 16, 32 or 64",
        "HYBRID_SERVE_MAX_NUM_SEQS is -2, must be 0 to 2147483647",
    ]


def test_an_empty_variable_is_no_key() -> None:
    """ADV-07: `-e HYBRID_SERVE_API_KEY=$UNSET`."""
    assert (
        refusal([], {"HYBRID_SERVE_API_KEY": ""})
        == "HYBRID_SERVE_API_KEY has an empty key, which would let everyone in"
    )


def test_a_variable_that_kubernetes_sets_is_explained() -> None:
    assert "enableServiceLinks" in refusal([], {"HYBRID_SERVE_PORT": "tcp://10.0.0.1:8000"})
    assert parse(["--port", "1"], {"HYBRID_SERVE_PORT": "tcp://10.0.0.1:8000"}).config.server.port == 1
    assert (
        stray_variables({"HYBRID_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000", "HYBRID_SERVE_SERVICE_HOST": "h"}) == []
    )


def test_a_misspelt_variable_is_pointed_out() -> None:
    environ = {"HYBRID_SERVE_PROT": "1", "HYBRID_SERVE_CONFIG": "f", "HOME": "/"}
    assert stray_variables(environ) == ["HYBRID_SERVE_PROT is set but is no option; did you mean PORT?"]


def test_lists_are_words_commas_or_yaml_lists(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("served_model_name: [a, 'b c']\n")
    assert parse(
        ["m", "--served-model-name", "a", "b", "--served_model_name", "c"], {}
    ).config.model.served_model_name == (
        "a",
        "b",
        "c",
    )
    assert parse([], {"HYBRID_SERVE_SERVED_MODEL_NAME": "a,b"}).config.model.served_model_name == ("a", "b")
    assert parse(["--config", str(file)], {}).config.model.served_model_name == ("a", "b c")


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\n")
    assert parse([], {"HYBRID_SERVE_CONFIG": str(file)}).config.server.port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nmax_num_seq: 4\n", "F:2: unknown option max_num_seq; did you mean max_num_seqs"),
        ("\n\nport: many\n", "F:3: port: 'many' is not a whole number"),
        ("port: 1\nhost: ::1\nport: 2\n", "F:3: port is set twice, first at F:1"),
        ("max-num-seqs: 1\nmax_num_seqs: 2\n", "F:2: max_num_seqs is set twice, first at F:1"),
        ("port: [1]\n", "F:1: port takes one value, not a list"),
        ("port: {a: 1}\n", "F:1: port takes one value, not a nested structure"),
        ("api_key: [[a]]\n", "F:1: api_key takes values, not a nested structure"),
        ("port:\n", "F:1: port has no value"),
        ("- port\n", "F:1: must be a mapping of options"),
        ("? [a]\n: 1\n", "F:1: a key must be the name of an option"),
        ("port: 1\n  host: x\n", "F:2: mapping values are not allowed here"),
        ("host: !!python/object/apply:os.system [id]\n", "F:1: host takes one value, not a list"),
        ("host: !!python/name:os.system x\n", "F:1: host has the tag tag:yaml.org,2002:python/name:os.system"),
        ("host: !local x\n", "F:1: host has the tag !local"),
        (b"host: \xff\xfe\n", "F: not YAML:"),
        ("port: 1\n---\nport: 2\n", "F:2:"),
        ("host: " + "[" * 800, "F: nested too deeply"),
        ("#" * (2**20 + 1), "--config F: larger than 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    """F-64."""
    assert in_file(tmp_path, text).startswith(message)


def test_a_yaml_bomb_costs_nothing(tmp_path: Path) -> None:
    """F-64: nine levels of nine aliases would be 10^8 texts."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    assert in_file(tmp_path, "\n".join(lines)).startswith("F:1: unknown option a")
    assert in_file(tmp_path, "served_model_name: &a [x]\napi_key: [*a, *a]").startswith("F:2: api_key takes values")


def test_an_empty_file_sets_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert parse(["--config", str(tmp_path / "c.yaml")], {}).origins == {}
    assert refusal(["--config", "/no/such"]) == "--config /no/such: No such file or directory"
    assert refusal(["--config", str(tmp_path)]).endswith("Is a directory")


def test_texts_of_the_file_keep_their_spelling(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("revision: 1e5\nserved_model_name: no\nmodel: 3.10\n")
    model = parse(["--config", str(file)], {}).config.model
    assert (model.revision, model.served_model_name, model.model) == ("1e5", ("no",), "3.10")


def test_the_summary_tells_values_and_origins_but_no_secret(tmp_path: Path) -> None:
    """ADV-57."""
    file = tmp_path / "c.yaml"
    file.write_text("kv_cache_memory_bytes: 2147483648\n")
    options = parse(["--port", "1", "--config", str(file)], {"HYBRID_SERVE_API_KEY": KEY})
    summary = options.summary()
    assert summary.startswith("3 options set by you: ")
    for part in ("port=1 (--port)", f"kv_cache_memory_bytes=2GiB ({file}:1)", "api_key=*** (HYBRID_SERVE_API_KEY)"):
        assert part in summary
    assert KEY not in summary
    assert parse([], {}).summary() == "0 options set by you"


def test_no_refusal_shows_a_key(tmp_path: Path) -> None:
    for text in (KEY + " ", KEY + "é", KEY + "\n"):
        assert KEY not in refusal(["--api-key", text])
        assert KEY not in refusal([], {"HYBRID_SERVE_API_KEY": text})
    assert KEY not in in_file(tmp_path, f"api_key: {{{KEY}: 1}}\n")


def test_help_lists_the_common_options_and_all_of_them_on_demand() -> None:
    """S2."""
    short, full = help_text(None), help_text("all")
    for setting in settings():
        assert (f"{setting.flag} " in short) == setting.option.common, setting.name
        assert setting.flag in full
    assert "--enable-prefix-caching" in help_text("cache")
    assert "--port" not in help_text("cache")
    with pytest.raises(UsageError, match="did you mean cache"):
        help_text("cach")


def test_a_list_may_be_written_as_json_as_vllm_takes_it() -> None:
    pages = ("https://a.example", "https://b.example")
    text = '["https://a.example", "https://b.example"]'
    for options in (
        parse(["--allowed-origins", *pages], {}),
        parse(["--allowed-origins", text], {}),
        parse([], {"HYBRID_SERVE_ALLOWED_ORIGINS": text}),
        parse([], {"HYBRID_SERVE_ALLOWED_ORIGINS": ",".join(pages)}),
    ):
        assert options.config.server.allowed_origins == pages
    assert parse(["--api-key", "[1]", "[x"], {}).config.server.api_key == ("[1]", "[x"), "these are keys"
