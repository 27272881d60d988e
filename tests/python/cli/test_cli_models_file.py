"""The file of --models: names, options and what is wrong with them (P9)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_serve.cli.main import main
from hybrid_serve.cli.models_file import read_models
from hybrid_serve.cli.options import parse
from hybrid_serve.cli.usage import UsageError
from hybrid_serve.served import ServedModel

FILE = """\
small:  # a comment
  model: /models/small
  max-num-seqs: 4
team/large:
  model: user/large
  revision: 1e5
  kv_cache_memory_bytes: 2GiB
  data_parallel_size: 2
  memory: 6GiB
  at_start: true
"last": {model: last.gguf}
"""


def models(folder: Path, text: str, *words: str) -> list[ServedModel]:
    file = folder / "models.yaml"
    file.write_text(text)
    return read_models(parse(["--models", str(file), *words], {}).config)


def test_each_model_has_its_own_options_over_those_of_all(tmp_path: Path) -> None:
    small, large, last = models(tmp_path, FILE, "--max-num-seqs", "9", "--max-model-len", "100")
    assert (small.name, large.name, last.name) == ("small", "team/large", "last")
    assert (small.config.model.model, small.config.model.max_model_len) == ("/models/small", 100)
    assert [each.config.scheduler.max_num_seqs for each in (small, large, last)] == [4, 9, 9]
    assert (large.config.model.revision, large.config.cache.kv_cache_memory_bytes) == ("1e5", 2 * 2**30)
    assert (large.memory, large.at_start, small.at_start) == (6 * 2**30, True, False)
    assert [list(each.engines) for each in (small, large, last)] == [[0], [1, 2], [3]]
    assert small.config.model.served_model_name == ("small",)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "models.yaml: must be a mapping of names to options"),
        ("- a", "models.yaml: must be a mapping of names to options"),
        ("a: b", "models.yaml:1: must be a mapping of options"),
        ("a:\n  max_num_seqs: 1", "models.yaml:1: a has no model"),
        ("a:\n  model: x\na:\n  model: y", "models.yaml:3: a is there twice"),
        ("a:\n  model: x\n  max_num_seq: 1", "models.yaml:3: unknown option max_num_seq; did you mean max_num_seqs"),
        ("a:\n  model: x\n  port: 1", "models.yaml:3: port is of the whole server, not of one model"),
        ("a:\n  model: x\n  served_model_name: b", "models.yaml:3: served_model_name is of the whole server"),
        ("a:\n  model: x\n  block_size: 17", "models.yaml:3: block_size is 17, must be 16, 32 or 64"),
        ("a:\n  model: x\n  max_num_seqs: many", "models.yaml:3: max_num_seqs: 'many' is not a whole number"),
        ("a:\n  model: x\n  memory: much", "models.yaml:3: memory: 'much' is not a size"),
        ("a:\n  model: x\n  data_parallel_size: 100", "models.yaml: its models have 100 engines, 99 may be"),
        ("a: {model: x, at_start: true}\nb: {model: x, at_start: true}", "a, b are to be loaded at the start, more"),
        ("a: [", "models.yaml:1: "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        models(tmp_path, text)
    assert complaint in str(caught.value)


def test_with_a_budget_of_bytes_every_model_says_what_it_takes(tmp_path: Path) -> None:
    text = "a:\n  model: x\n  memory: 1GiB\nb:\n  model: y\n"
    with pytest.raises(UsageError, match="4: memory of b is not said, max_loaded_bytes is 2147483648"):
        models(tmp_path, text, "--max-loaded-bytes", "2GiB")
    with pytest.raises(UsageError, match="1: memory of a is 1073741824, max_loaded_bytes is 1024"):
        models(tmp_path, text, "--max-loaded-bytes", "1KiB")
    assert len(models(tmp_path, text)) == 2


def test_the_file_of_the_docs_can_be_copied(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    text = page.partition("```yaml\n")[2].partition("```")[0]
    chat, code, small = models(tmp_path, text, "--max-loaded-models", "2")
    assert (chat.name, chat.at_start, code.config.model.max_model_len) == ("chat", True, 16384)
    assert small.config.scheduler.max_num_seqs == 64


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["MODEL", "--models", "f"], "--models names all models"),
        (["--models", "f", "--served-model-name", "x"], "--models names all models"),
        (["--models", "f", "--data-parallel-rank", "0"], "data_parallel_rank is not for a server of several models"),
        (["--models", "f", "--distributed-executor-backend", "ray"], "is not for a server of several models"),
        (["--max-loaded-models", "2"], "--models is needed with a limit for loaded models"),
    ],
)
def test_options_that_contradict_several_models_are_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words, {})
    assert complaint in str(caught.value).replace("--data-parallel-rank", "data_parallel_rank")


@pytest.mark.parametrize("command", [["fit"], ["run-batch"], ["bench", "latency"], ["bench", "startup"]])
def test_commands_for_one_model_say_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--models", "models.yaml"]) == 2
    assert "--models" in capsys.readouterr().err
