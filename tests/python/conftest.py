"""Makes the modules beside this file importable by every test: fakes, tiny models, harnesses."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from audited import SITE, Audited

sys.path.insert(1, SITE)  # some tests give their path to what they start
# A shell that starts tests in the background has them ignore SIGINT, nohup SIGHUP, and every program they start would
# inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """ADV-01: of every server that any test starts."""
    audited = Audited(tmp_path_factory.mktemp("audited"))
    os.environ.update(audited.environment)
    yield audited
    assert audited.take() == []  # after the last one's end


@pytest.fixture(autouse=True)
def nothing_ran_in_a_server_that_should_not(audited: Audited) -> Iterator[None]:
    yield
    assert audited.take() == []
