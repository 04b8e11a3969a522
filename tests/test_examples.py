"""The worked examples of the documentation: the code blocks are written to files and the commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project_tree import ROOT

PAGES = ("README.md", "docs/extending.md")
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = "my_method.py"


def example(page: str) -> tuple[str, list[list[str]]]:
    """The code of my_method.py on a page, and the commands about it that follow, with what prepares them."""
    code, commands = "", []
    for language, block in FENCED.findall(page):
        if language == "python":
            if block.startswith(f"# {FILE}\n"):
                code = block
            continue
        for line in block.splitlines() if code else []:
            words = shlex.split(line.removeprefix("$ ").removeprefix(".venv/bin/"), comments=True)
            on_generated_text = "tinydocs" in words or "clbench.contract" in words
            about = words == ["clbench", "prepare", "tinydocs"] or (on_generated_text and FILE in line)
            if words[:1] in (["clbench"], ["pytest"], ["python"]) and about:
                commands.append(words)
    return code, commands


def as_run_here(words: list[str]) -> list[str]:
    """The command with this interpreter, from a checkout that may not be installed."""
    module, *rest = words if words[0] != "python" else words[2:]
    plugin = ["-p", "clbench.contract.plugin", "-p", "no:cacheprovider", "-q"] if module == "pytest" else []
    return [sys.executable, "-m", module, *plugin, *rest]


def test_an_example_is_read_as_it_stands() -> None:
    code = "# my_method.py\nx = 1\n"
    before = "```\nclbench prepare tinydocs\n```\n"
    page = f"{before}```python\n{code}```\ntext\n```sh\n$ clbench run -t tinydocs -m my_method.py\nls\n```\n"
    command = ["clbench", "run", "-t", "tinydocs", "-m", "my_method.py"]
    assert example(page) == (code, [command])
    assert as_run_here(["python", "-m", "pytest", "x"])[1:3] == ["-m", "pytest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_example_works_as_written(name: str, tmp_path: Path) -> None:
    code, commands = example((ROOT / name).read_text("utf-8"))
    if not code and name == "README.md":
        pytest.skip("the README has no my_method.py")
    assert any(FILE in " ".join(words) for words in commands), "no command is about the example"
    (tmp_path / FILE).write_text(code, "utf-8")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "CLBENCH_HOME": str(tmp_path / "home"), "NO_COLOR": "1"}
    if not any(words[:2] == ["clbench", "prepare"] for words in commands):
        commands = [["clbench", "prepare", "tinydocs"], *commands]
    for words in commands:
        done = subprocess.run(
            as_run_here(words), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert any((tmp_path / "runs").rglob("run.yaml")) or not any("run" in words for words in commands)
