"""What tests of the project itself share: where the tree is, which files belong to it, what they import."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTENT = ("methods", "streams", "eval", "leaderboard")

# What a checkout that is not a git repository (an unpacked sdist) may hold beside the project's own files.
_NOT_OURS = {
    ".git",
    ".cache",
    ".venv",
    "runs",
    "build",
    "dist",
    "site",
    "mlruns",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
}


def project_files() -> list[Path]:
    """Every file of the project, relative to its root: what git tracks or would track, without symlinks."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        paths = sorted(Path(name) for name in listed if name)
    else:
        paths = sorted(_walk(ROOT))
    return [path for path in paths if (ROOT / path).is_file() and not (ROOT / path).is_symlink()]


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files below root, relative to it, passing by caches and what symlinks point to."""
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in _NOT_OURS and not n.endswith(".egg-info")]
        for name in files:
            yield (Path(folder) / name).relative_to(root)


def python_files(*folders: str) -> list[Path]:
    """The project's Python files below the named top-level folders, or all of them."""
    return [p for p in project_files() if p.suffix == ".py" and (not folders or p.parts[0] in folders)]


def module_name(path: Path) -> str:
    """The name that a file of the package is imported by: methods/x.py is clbench.methods.x."""
    parts = path.with_suffix("").parts
    if parts[0] in CONTENT:
        parts = ("clbench", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions included.

    ``from a import b`` counts as both ``a`` and ``a.b``, because b may be a module.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.append((node.lineno, base))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def is_within(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies below it."""
    return name == package or name.startswith(package + ".")
