"""The table of docs/layouts.md is what its script writes, and nothing of it ends in an unexpected error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_the_table_of_model_types_is_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "build_layouts.py"), "--check"]
    assert subprocess.run(command, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"}).returncode == 0
