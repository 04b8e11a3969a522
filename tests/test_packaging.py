"""The wheel as a user gets it: what is in it, and that it runs outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.project_tree import CONTENT, ROOT, project_files

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DATA_THAT_STAYS_HOME = ("leaderboard/submissions/",)
"""Folders inside packages whose files are of the project, not of the package."""


def run(words: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command without PYTHONPATH and return what it printed, or fail with all it said."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**inherited, **environment})
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist, from a copy of the project's own files."""
    tree = tmp_path_factory.mktemp("tree")
    for path in project_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    for name in CONTENT:
        (tree / "clbench" / name).symlink_to(Path("..") / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"], cwd=tree)
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment that holds the wheel, with this one's packages as dependencies.

    A .pth line adds a folder but obeys no .pth in it, so an editable install of the checkout cannot leak in.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", built[1]]
    run([sys.executable, "-m", "pip", "--python", python, *install], cwd=folder, PIP_CONFIG_FILE=os.devnull)
    return folder / "bin"


def members(wheel: Path) -> set[str]:
    """The names of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_packages_listed_are_the_folders_with_an_init() -> None:
    tools = PYPROJECT["tool"]["setuptools"]
    folders = {p.parent for p in project_files() if p.name == "__init__.py" and p.parts[0] != "tests"}
    names = {".".join(("clbench", *f.parts) if f.parts[0] in CONTENT else f.parts) for f in folders}
    assert sorted(tools["packages"]) == sorted(names)
    assert tools["package-dir"] == {"clbench": "clbench"} | {f"clbench.{name}": name for name in CONTENT}


def test_content_is_linked_into_the_engine_by_relative_links() -> None:
    for name in CONTENT:
        link = ROOT / "clbench" / name
        assert link.is_symlink(), f"clbench/{name} is no symlink; clone with core.symlinks=true"
        assert link.readlink() == Path("..") / name


def test_the_wheel_holds_every_module_and_data_file_and_only_clbench(built: tuple[Path, Path]) -> None:
    held = members(built[1])
    tops = {name.split("/")[0] for name in held}
    assert tops == {"clbench", f"clbench-{PYPROJECT['project']['version']}.dist-info"}
    wanted = set()
    for path in project_files():
        name = path.as_posix()
        if path.parts[0] in CONTENT and not name.startswith(DATA_THAT_STAYS_HOME):
            wanted.add(f"clbench/{name}")
        elif path.parts[0] == "clbench":
            wanted.add(name)
    wanted = {name for name in wanted if not name.endswith(".md")}
    assert {"clbench/py.typed", "clbench/methods/__init__.py", "clbench/results/store.py"} <= wanted
    assert held - {name for name in held if ".dist-info/" in name} == wanted


def test_the_wheel_says_what_it_is(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["clbench"]
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    assert "clbench = clbench.cli:main" in scripts
    assert licence == (ROOT / "LICENSE").read_text("utf-8")


def test_the_sdist_holds_no_run_and_no_cache(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = archive.getnames()
    assert any(name.endswith("/methods/__init__.py") for name in names)
    assert [n for n in names if {".git", ".venv", ".cache", "runs", "__pycache__"} & set(n.split("/"))] == []


def test_the_installed_package_is_the_wheel_and_brings_no_bare_names(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, json, sys, clbench, clbench.methods\n"
        "names = ['methods', 'streams', 'eval', 'leaderboard', 'tests']\n"
        "bare = [name for name in names if importlib.util.find_spec(name)]\n"
        "sys.stdout.write(json.dumps([clbench.__file__, clbench.methods.__file__, bare]))"
    )
    engine, methods, bare = json.loads(run([installed / "python", "-c", code], cwd=tmp_path))
    for file in (engine, methods):
        assert Path(file).is_relative_to(installed.parent)
    assert bare == []


def test_the_installed_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    home = {"CLBENCH_HOME": str(tmp_path / "home"), "COLUMNS": "200", "NO_COLOR": "1"}
    assert "prepare" in run([installed / "clbench", "--help"], cwd=tmp_path, **home)
    listed = run([installed / "clbench", "list"], cwd=tmp_path, **home)
    for name in ("sequential", "replay", "frozen"):
        assert name in listed
