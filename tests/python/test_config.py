"""The configuration: every field reachable from outside, sensible, and equal on both ends of a pipe."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hybrid_serve.cli.options import parse
from hybrid_serve.cli.settings import ENV_PREFIX, Setting, settings
from hybrid_serve.cli.vllm_flags import NOT_SUPPORTED
from hybrid_serve.config import Config, ModelConfig, ParallelConfig, ServerConfig
from hybrid_serve.problems import is_loopback, problems, validate
from hybrid_serve.ranges import RANGES

SETTINGS = settings()
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)

# Texts that a generic choice would make invalid, or equal to the default.
SPECIAL = {
    "block_size": "32",
    "data_parallel_size": "2",
    "data_parallel_size_local": "1",
    "data_parallel_start_rank": "1",
    "data_parallel_rank": "1",
    "gpu_memory_utilization": "0.5",
    "host": "::1",
    "root_path": "/llm",
    "metrics_prefix": "mine:",
    "ssl_cert_reqs": "2",
}

# Options that mean something only beside others.
BESIDE = {
    "data_parallel_start_rank": {
        "data_parallel_hybrid_lb": "true", "data_parallel_size": "2", "data_parallel_size_local": "1"
    },
    "data_parallel_rank": {"data_parallel_size": "2"},
    "data_parallel_external_lb": {"data_parallel_rank": "0"},
    "headless": {"data_parallel_key_file": "keys"},
    "max_loaded_models": {"models": "models.yaml"},
    "max_loaded_bytes": {"models": "models.yaml"},
}  # fmt: skip


def beside(setting: Setting) -> dict[str, str]:
    """Variables without which the option makes no sense."""
    return {ENV_PREFIX + name.upper(): text for name, text in BESIDE.get(setting.name, {}).items()}


def example(setting: Setting) -> str:
    """A text for the option that means something other than its default."""
    if setting.name in SPECIAL:
        return SPECIAL[setting.name]
    if setting.type is bool:
        return "false" if setting.default else "true"
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    return "2048" if setting.type is int else "7.5" if setting.type is float else "some-text"


def effective(config: Config, setting: Setting) -> Any:
    return getattr(getattr(config, setting.group), setting.name)


def expected(setting: Setting) -> Any:
    value = setting.value(example(setting))
    return (value,) if setting.is_tuple else value


def test_defaults_are_valid_and_survive_json() -> None:
    assert problems(Config()) == []
    assert Config.from_json(Config().to_json()) == Config()
    assert validate(Config()) == Config()


@EVERY_SETTING
def test_every_field_survives_json_and_changes_the_digest(setting: Setting) -> None:
    changed = parse(
        [f"{setting.flag}={example(setting)}"] if setting.type is not bool else [flag_for(setting)], beside(setting)
    ).config
    assert Config.from_json(changed.to_json()) == changed
    assert changed.digest() != Config().digest()


def flag_for(setting: Setting) -> str:
    return setting.flag if example(setting) == "true" else "--no-" + setting.flag[2:]


@EVERY_SETTING
def test_every_field_has_help_and_is_named_once(setting: Setting) -> None:
    assert setting.option.help.strip()
    assert setting.option.help[0].islower() or setting.option.help[0].isupper()
    assert [other.name for other in SETTINGS].count(setting.name) == 1
    assert setting.flag[2:] not in NOT_SUPPORTED


@EVERY_SETTING
def test_a_flag_reaches_every_field_with_dashes_or_underscores(setting: Setting) -> None:
    words = [flag_for(setting)] if setting.type is bool else [setting.flag, example(setting)]
    for flag in (words[0], "--" + words[0][2:].replace("-", "_")):
        options = parse([flag, *words[1:]], beside(setting))
        assert effective(options.config, setting) == expected(setting) != setting.default
        assert options.origins[setting.name] == setting.flag


@EVERY_SETTING
def test_a_variable_reaches_every_field(setting: Setting) -> None:
    options = parse([], beside(setting) | {setting.variable: example(setting)})
    assert effective(options.config, setting) == expected(setting) != setting.default
    assert options.origins[setting.name] == setting.variable


@EVERY_SETTING
def test_the_file_reaches_every_field(setting: Setting, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"# a comment\n{setting.name}: {example(setting)!r}\n")
    options = parse(["--config", str(file)], beside(setting))
    assert effective(options.config, setting) == expected(setting) != setting.default
    assert options.origins[setting.name] == f"{file}:2"


@EVERY_SETTING
def test_a_flag_beats_the_environment_and_that_the_file(setting: Setting, tmp_path: Path) -> None:
    """F-64. Lists are replaced as a whole."""
    file = tmp_path / "c.yaml"
    file.write_text(f"{setting.name}: {example(setting)!r}\n")
    default = setting.shown(setting.default) or "/other"
    variables = beside(setting) | {setting.variable: "other" if setting.option.secret else default}
    by_variable = parse(["--config", str(file)], variables)
    assert by_variable.origins[setting.name] == setting.variable
    assert effective(by_variable.config, setting) != expected(setting)
    words = [flag_for(setting)] if setting.type is bool else [setting.flag, example(setting)]
    by_flag = parse([*words, "--config", str(file)], beside(setting) | {setting.variable: "nonsense"})
    assert effective(by_flag.config, setting) == expected(setting)
    assert by_flag.origins[setting.name] == setting.flag


def test_every_number_has_a_range() -> None:
    numbers = {setting.name for setting in SETTINGS if setting.type in (int, float)}
    assert numbers - {"block_size"} == set(RANGES)


@pytest.mark.parametrize("bound", [0, 1])
def test_both_ends_of_every_range_are_held(bound: int) -> None:
    for name, ends in RANGES.items():
        group = next(setting.group for setting in SETTINGS if setting.name == name)
        beyond = ends[bound] + (-1, 1)[bound]
        for value, is_good in ((ends[bound], True), (beyond, False)):
            config = replace(Config(), **{group: replace(getattr(Config(), group), **{name: value})})
            assert (name not in dict(problems(config))) == is_good, (name, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_time_that_is_no_number_is_refused(value: float) -> None:
    assert "shutdown_timeout" in dict(problems(Config(server=ServerConfig(shutdown_timeout=value))))


@pytest.mark.parametrize("size", [0, 1, 8, 48, 128])
def test_only_three_block_sizes_are_taken(size: int) -> None:
    config = replace(Config(), cache=replace(Config().cache, block_size=size))
    assert dict(problems(config))["block_size"] == f"is {size}, must be 16, 32 or 64"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_host_open_to_others_needs_a_key_or_consent(host: str) -> None:
    """Decision 14."""
    assert [name for name, _ in problems(Config(server=ServerConfig(host=host)))] == ["host"]
    assert problems(Config(server=ServerConfig(host=host, api_key=("k3y",)))) == []
    assert problems(Config(server=ServerConfig(host=host, insecure_no_auth=True))) == []


@pytest.mark.parametrize(
    ("host", "is_local"), [("localhost", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True)]
)
def test_loopback_addresses_are_known(host: str, is_local: bool) -> None:
    assert is_loopback(host) == is_local


@pytest.mark.parametrize("keys", [("",), (" ",), ("\t",), ("good", "")])
def test_an_empty_key_is_refused(keys: tuple[str, ...]) -> None:
    """ADV-07: an empty secret is falsy, and the check behind it would never run."""
    assert "empty key" in dict(problems(Config(server=ServerConfig(api_key=keys))))["api_key"]


@pytest.mark.parametrize("key", ["se cret", "sécret", "secret\n"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    found = problems(Config(server=ServerConfig(api_key=(key,))))
    assert {name for name, _ in found} == {"api_key"}
    assert all("cret" not in text for _, text in found)


@pytest.mark.parametrize("name", ["a\nINFO forged", "a\x1b[2Jb", "a\u2028b"])
def test_a_name_with_control_characters_is_refused(name: str) -> None:
    """ADV-57."""
    assert "served_model_name" in dict(problems(Config(model=ModelConfig(served_model_name=(name,)))))


def test_validate_names_every_problem() -> None:
    config = Config(server=ServerConfig(port=70000, root_path="llm/", host=""))
    with pytest.raises(ValueError, match=r"port is 70000.*host is empty.*root_path is 'llm/'"):
        validate(config)


def test_two_sizes_of_the_cache_are_a_contradiction() -> None:
    cache = replace(Config().cache, kv_cache_memory_bytes=2**20, num_gpu_blocks_override=8)
    assert "num_gpu_blocks_override" in dict(problems(replace(Config(), cache=cache)))


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"data_parallel_external_lb": True}, "data_parallel_rank", "data_parallel_external_lb"),
        ({"data_parallel_rank": 1}, "data_parallel_size", "ranks [1]"),
        ({"data_parallel_rank": 0, "data_parallel_hybrid_lb": True}, "data_parallel_rank", "hybrid_lb"),
        ({"data_parallel_rank": 0, "data_parallel_size_local": 2}, "data_parallel_rank", "one engine"),
        ({"headless": True}, "data_parallel_key_file", "hybrid-serve keys"),
        ({"headless": True, "data_parallel_key_file": "x", "data_parallel_rank": 0}, "headless", "no API server"),
        ({"headless": True, "data_parallel_key_file": "x", "data_parallel_hybrid_lb": True}, "headless", "no API"),
        ({"headless": True, "data_parallel_size_local": 0}, "data_parallel_size_local", "no engine"),
        ({"headless": True, "data_parallel_size": 2, "data_parallel_start_rank": 2}, "data_parallel_size", "[2]"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 3}, "data_parallel_size", "ranks [0, 1, 2]"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, "data_parallel_key_file", "several machines"),
        ({"data_parallel_size": 2, "data_parallel_start_rank": 1}, "headless", "data_parallel_start_rank"),
        ({"data_parallel_address": ""}, "data_parallel_address", "127.0.0.1"),
    ],
)
def test_modes_of_several_engines_that_contradict_each_other_are_refused(
    options: dict[str, Any], field: str, words: str
) -> None:
    """S12: exit code 2, with the numbers."""
    found = dict(problems(Config(parallel=ParallelConfig(**options))))
    assert words in found[field], found


@pytest.mark.parametrize(
    ("options", "local", "remote"),
    [
        ({}, [0], []),
        ({"data_parallel_size": 3}, [0, 1, 2], []),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, [0, 1], [2, 3]),
        ({"data_parallel_size": 2, "data_parallel_size_local": 0}, [], [0, 1]),
        ({"headless": True, "data_parallel_start_rank": 2, "data_parallel_size_local": 2}, [2, 3], []),
        ({"headless": True, "data_parallel_size": 4, "data_parallel_start_rank": 3}, [3], []),
        (
            {"data_parallel_hybrid_lb": True, "data_parallel_size": 4, "data_parallel_size_local": 2}
            | {"data_parallel_start_rank": 2},
            [2, 3],
            [],
        ),
        ({"data_parallel_rank": 3, "data_parallel_size": 4, "data_parallel_external_lb": True}, [3], []),
    ],
)
def test_each_mode_says_which_engines_are_here_and_which_will_join(
    options: dict[str, Any], local: list[int], remote: list[int]
) -> None:
    """S9, S12."""
    parallel = ParallelConfig(data_parallel_key_file="x", **options)
    assert problems(Config(parallel=parallel)) == []
    assert (list(parallel.local_ranks), list(parallel.remote_ranks)) == (local, remote)


def test_the_configuration_is_frozen() -> None:
    for group in (Config(), *vars(Config()).values()):
        with pytest.raises(FrozenInstanceError):
            setattr(group, fields(group)[0].name, None)


def test_every_group_says_what_it_is() -> None:
    for group_type in get_type_hints(Config).values():
        assert group_type.__doc__
        assert "(" not in group_type.__doc__  # dataclass writes a signature where there is no text
