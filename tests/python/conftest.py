"""Makes the modules beside this file importable by every test: fakes, tiny models, harnesses."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# A shell that starts tests in the background has them ignore SIGINT, nohup SIGHUP, and every program they start would
# inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
