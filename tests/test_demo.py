"""checks/demo.py: what `make run` shows."""

import io
import runpy
import subprocess
import sys

from tests.stage import ROOT

DEMO = runpy.run_path(str(ROOT / "checks/demo.py"))


def test_each_line_says_whose_it_is() -> None:
    words = [sys.executable, "-c", "import sys; print('one\\ntwo', file=sys.stderr)"]
    log = io.StringIO()
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        DEMO["copy_log"]("server", process, log)
    assert log.getvalue() == "server   | one\nserver   | two\n"
