"""The house: which way imports point, what stays out of light paths, what may not stand in the tree."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project_tree import CONTENT, ROOT, imported_names, is_within, project_files, python_files

HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "lm_eval",
    "datasets",
    "accelerate",
    "matplotlib",
    "scipy",
    "pyarrow",
)


# --- which way imports point ---


def wrong_imports(source: str, path: Path) -> list[str]:
    """Imports of one file that point the wrong way, as "path:line name (why)"."""
    top = path.parts[0]
    wrong = []
    for line, name in imported_names(source, path):
        at = f"{path}:{line} {name}"
        if name.split(".")[0] in CONTENT:
            wrong.append(f"{at} (import it as clbench.{name})")
        for content in CONTENT:
            if not is_within(name, f"clbench.{content}"):
                continue
            if top == "clbench":
                wrong.append(f"{at} (the engine imports content; load it through clbench.registry)")
            elif top in CONTENT and top != content:
                wrong.append(f"{at} (content imports other content)")
    return wrong


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("clbench/train/loop.py", "import clbench.methods.replay"),
        ("clbench/train/loop.py", "def f():\n    from clbench import methods"),
        ("clbench/train/loop.py", "from ..streams import codedocs"),
        ("clbench/cli.py", "from .leaderboard.site import build"),
        ("methods/replay.py", "from clbench.eval.heldout import HeldOut"),
        ("leaderboard/site/__init__.py", "from ...streams import codedocs"),
        ("tests/test_x.py", "from methods import replay"),
        ("tests/test_x.py", "import eval"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_seen(path: str, source: str) -> None:
    assert wrong_imports(source, Path(path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("clbench/train/loop.py", "from clbench.method import Method\nfrom . import data"),
        ("clbench/cli.py", "from clbench.registry import load"),
        (
            "methods/replay.py",
            "from clbench.method import Method\nfrom clbench.methods.sequential import Sequential",
        ),
        ("eval/capacity/rank.py", "from ..heldout import rows"),
        ("tests/test_x.py", "from clbench.methods import replay"),
    ],
)
def test_an_import_that_points_the_right_way_is_left_alone(path: str, source: str) -> None:
    assert wrong_imports(source, Path(path)) == []


def test_the_engine_imports_no_content_and_content_no_other_content() -> None:
    files = python_files()
    assert Path("clbench/stream.py") in files and Path("methods/__init__.py") in files
    assert [wrong for path in files for wrong in wrong_imports((ROOT / path).read_text("utf-8"), path)] == []


# --- what light paths may not load ---


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Run code in a fresh interpreter and return the names of all modules it ended with."""
    tail = "\nimport sys, json; sys.stderr.write('\\nMODULES' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.rpartition("MODULES")[2]))


def test_results_load_neither_torch_nor_transformers_nor_mlflow() -> None:
    modules = [f"clbench.results.{path.stem}" for path in python_files("clbench") if path.parent.name == "results"]
    assert "clbench.results.store" in modules
    loaded = loaded_by("\n".join(f"import {name.removesuffix('.__init__')}" for name in modules))
    assert "clbench.results.store" in loaded
    assert loaded & {"torch", "transformers", "mlflow", "accelerate", "lm_eval"} == set()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "from clbench.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    loaded = loaded_by(code, "--help")
    assert "clbench.cli" in loaded
    assert loaded & set(HEAVY) == set()


def test_content_is_loaded_under_its_own_name_only() -> None:
    files = [p for p in python_files(*CONTENT) if p.name != "__init__.py" and len(p.parts) == 2]
    if not files:
        pytest.skip("no content yet")
    names = [f"clbench.{p.parts[0]}.{p.stem}" for p in files]
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert loaded & set(CONTENT) == set()


# --- what may not stand in code ---

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for nested attributes of a name, otherwise an empty string for what is unknown."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str, path: Path) -> list[str]:
    """Ways in one file to run what came from outside: unpickling, remote code, a shell, eval."""
    found = [
        f"{path}:{line} imports {name}" for line, name in imported_names(source, path) if name.split(".")[0] in PICKLERS
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = dotted(node.func), {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
        at = f"{path}:{node.lineno} {called}"
        found += [f"{at}: {name}" for name in ("shell", "trust_remote_code", "allow_pickle") if given.get(name, False)]
        if called == "torch.load" and given.get("weights_only") is not True:
            found.append(f"{at}: without weights_only")
        if called in {
            "os.system",
            "os.popen",
            "eval",
            "exec",
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
        }:
            found.append(at)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        f"torch.{'load'}(path)",
        f"torch.{'load'}(path, weights_only={False})",
        f"subprocess.run(line, shell={True})",
        f"AutoModel.from_pretrained(name, trust_remote_code={True})",
        "AutoModel.from_pretrained(name, trust_remote_code=options.trust)",
        f"np.load(path, allow_pickle={True})",
        "os.system(line)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert dangers(source, Path("methods/x.py"))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        f"subprocess.run(words, shell={False})",
        "from safetensors.torch import load_file",
    ],
)
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert dangers(source, Path("methods/x.py")) == []


def test_nothing_in_the_tree_runs_what_came_from_outside() -> None:
    assert [bad for path in python_files() for bad in dangers((ROOT / path).read_text("utf-8"), path)] == []


def test_library_code_does_not_print() -> None:
    prints = []
    for path in python_files("clbench", *CONTENT):
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
            if isinstance(node, ast.Call) and dotted(node.func) == "print":
                prints.append(f"{path}:{node.lineno}")
    assert prints == []


# --- what may not stand in any file ---

# Registries are named by pip's own settings and folders by their user. (Written so that this file passes.)
HOSTS_AND_MACHINE_PATHS = re.compile(
    r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|registry\.npm[j]s|deb\.deb[i]an"
    r"|/wor[k]/(main|shared|steering|\.library)|/opt/py[p]i|/opt/whee[l]s|/tm[p]/(scratch|bash_jobs|research)"
    r"|/hom[e]/[a-z]|/roo[t]/|/User[s]/[A-Za-z]"
)


@pytest.mark.parametrize("text", ["https://{}/simple", "files.{}", "see {}/x"])
def test_a_host_is_seen(text: str) -> None:
    assert HOSTS_AND_MACHINE_PATHS.search(text.format("py" + "pi.org"))


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = (ROOT / path).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {hit.group()}" for hit in HOSTS_AND_MACHINE_PATHS.finditer(text)]
    assert found == []
