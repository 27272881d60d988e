"""Makes the modules beside this file importable by every test: fakes, tiny models, harnesses."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
