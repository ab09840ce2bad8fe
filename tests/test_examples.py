"""What the README and examples/ show runs as it stands, here and against a server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("way", ["local", "server"])
def test_the_readme_example_runs(way, target, capsys):
    code = CODE.replace('"local:"', f'"{target}"') if way == "server" else CODE
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("label row ") and "POINT" in line for line in lines[:5])


def test_the_readme_example_is_about_ten_lines():
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 11


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_example_is_in_its_index():
    index = (ROOT / "examples" / "README.md").read_text()
    assert all(f"`{path.name}`" in index for path in (ROOT / "examples").glob("*.py"))


def test_the_readme_lists_every_strategy_and_its_links_lead_somewhere():
    from queryselect_service import strategy

    strategy.load()
    assert all(f"| `{name}` |" in README for name in strategy.STRATEGIES)
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\":]+)[)\"]", page.read_text()):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"
