"""The README's Python blocks run as written, and its commands are those that .ci/run executes.

Planted faults seen to fail: a misspelt function in the first block; the marker of the test command removed.
"""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_quickstart_runs_and_learns(tmp_path):
    script = tmp_path / "quickstart.py"
    script.write_text(BLOCKS[0] + "\nassert float(metrics['main_loss']) < 8.2, metrics\nassert logits.shape == (4, 64, 4096)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 5 and lines[0].startswith("0 8."), done.stdout


def test_the_other_blocks_define_what_they_say(tmp_path):
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(BLOCKS[1:]))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_are_found_by_ci(name):
    found = re.search(rf"<!-- {name} -->\n```sh\n(.+?)\n```", README, re.S)
    assert found and found[1].startswith("python3 -m venv .venv"), f"README.md has no command marked {name}"
    assert f"readme {name}" in (ROOT / ".ci/run").read_text()
