"""The catalogue of errors against the source: nothing is raised that it lacks, and nothing is in it in vain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_serve.catalogue import ANSWERS, FAULTS
from hybrid_serve.cli.main import main
from hybrid_serve.errors import StartupError

PACKAGE = Path(__file__).parents[2] / "python" / "hybrid_serve"
SOURCES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "catalogue.py"]
# Where the name of an HTTP error stands in the arguments of what raises or sends it.
NAME_ARGUMENT = {"ApiError": 0, "EngineRejected": 2, "Reject": 4}


def calls(name: str) -> Iterator[ast.Call]:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield node


def constants_in(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def test_every_number_in_the_source_is_in_the_catalogue_and_every_startup_number_is_in_the_source() -> None:
    used = {code for file in SOURCES for code in re.findall(r"HS-E\d{3}\b", file.read_text())}
    assert used - set(FAULTS) == set()
    raised = {
        code for name in ("StartupError", "StartupFailure") for call in calls(name) for code in constants_in(call)
    }
    assert {code for code, fault in FAULTS.items() if fault.exit_code} - raised == set()


def test_every_name_of_an_http_error_is_in_the_catalogue() -> None:
    sent = set()
    for kind, place in NAME_ARGUMENT.items():
        for call in calls(kind):
            if len(call.args) > place and isinstance(call.args[place], ast.Constant):
                sent |= constants_in(call.args[place])
    assert len(sent) > 15
    assert sent - set(ANSWERS) == set()


def test_every_http_error_of_the_catalogue_is_sent_by_somebody() -> None:
    said = {text for file in SOURCES for text in constants_in(ast.parse(file.read_text()))}
    assert set(ANSWERS) - said == set()


def test_an_entry_is_a_start_or_an_answer_and_no_number_is_given_twice() -> None:
    source = (PACKAGE / "catalogue.py").read_text()
    assert len(re.findall(r"^    _(?:start|http)\(", source, re.MULTILINE)) == len(FAULTS)
    for fault in FAULTS.values():
        assert bool(fault.exit_code) is not bool(fault.status and fault.name), fault.code
        assert fault.cause.endswith(".")
        assert fault.fix.endswith("."), fault.code


def test_a_startup_error_takes_its_exit_code_from_the_catalogue() -> None:
    assert StartupError("HS-E026", "a", "b", "c").failure.exit_code == 12
    assert StartupError("HS-E026", "a", "b", "c", 20).failure.exit_code == 20
    with pytest.raises(KeyError):
        StartupError("HS-E998", "a", "b", "c")


@pytest.mark.parametrize("word", ["HS-E031", "hs-e031", "E31", "31"])
def test_explain_prints_cause_and_fix(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert main(["explain", word]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    fault = FAULTS["HS-E031"]
    assert shown == f"HS-E031 {fault.title} exit code 13 why {fault.cause} fix {fault.fix}"


def test_explain_knows_the_codes_of_http_errors_and_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "model_not_found"]) == 0
    assert "HTTP 404" in capsys.readouterr().out
    assert main(["explain"]) == 0
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == list(FAULTS)


def test_explain_refuses_what_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "HS-E999"]) == 2
    assert main(["explain", "model_not_fond"]) == 2
    assert "did you mean model_not_found" in capsys.readouterr().err
