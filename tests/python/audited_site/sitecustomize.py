"""Python runs this at its start wherever the folder is on its path: processes of servers under test get their hook."""

import os
import sys
from importlib import import_module
from pathlib import Path

if "TEST_AUDIT_FILE" in os.environ:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import_module("audit_hook").install()
    del sys.path[0]
