"""The check of pull requests, on real git repositories: what it takes out and everything it must refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project_tree import ROOT

SCRIPT = ROOT / "scripts" / "submission_changes.py"
ENTRY = "leaderboard/submissions/codedocs-nano/mine-20260101-abc123"


class Repository:
    """A real repository with a base branch that moved on and a pull request's branch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch", "main")
        self.write(f"{Path(ENTRY).parent}/old-20250101-000000/entry.json", "{}")
        self.write("clbench/loop.py", "x = 1\n")
        self.commit("base")
        self.git("checkout", "--quiet", "-b", "pr")

    def git(self, *words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@example.invalid", "-c", "commit.gpgsign=false"]
        quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        words = ("git", *names, *words)
        done = subprocess.run(words, cwd=self.folder, check=True, capture_output=True, env={**os.environ, **quiet})
        return done.stdout.decode()

    def write(self, path: str, text: str) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
        return target

    def commit(self, message: str = "change") -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def check(self, out: Path) -> subprocess.CompletedProcess[str]:
        """Commit what is there and run the script from a checkout of main, as CI does."""
        self.commit()
        self.git("checkout", "--quiet", "main")
        words = [sys.executable, SCRIPT, "--base", "main", "--head", "pr", "--out", out]
        return subprocess.run(words, cwd=self.folder, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_a_new_entry_is_taken_out_byte_for_byte(repository: Repository, tmp_path: Path) -> None:
    repository.write(f"{ENTRY}/entry.json", '{"name": "…"}\r\n')
    repository.write(f"{ENTRY}/seed-0/rows.csv", "a,b\n")
    done = repository.check(tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "out" / ENTRY
    assert (folder / "entry.json").read_bytes() == '{"name": "…"}\r\n'.encode()
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["entry.json", "rows.csv"]


def test_newer_work_on_the_base_is_not_blamed_on_the_pull_request(repository: Repository, tmp_path: Path) -> None:
    repository.write(f"{ENTRY}/entry.json", "{}")
    repository.commit()
    repository.git("checkout", "--quiet", "main")
    repository.write("clbench/loop.py", "x = 2\n")
    repository.commit()
    repository.git("checkout", "--quiet", "pr")
    repository.write(f"{ENTRY}/README.md", "mine\n")
    assert repository.check(tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("path", "because"),
    [
        ("clbench/loop.py", "not below"),
        (".github/workflows/submission.yml", "not below"),
        ("leaderboard/submissions/README.md", "not below"),
        ("leaderboard/submissions/codedocs-nano/entry.json", "not below"),
        ("leaderboard/tracks/codedocs-nano/mine/x.json", "not below"),
        ("leaderboard/submissions/codedocs-nano/old-20250101-000000/entry.json", "only adds"),
        ("leaderboard/submissions/codedocs-nano/old-20250101-000000/more.json", "exists already"),
        ("leaderboard/submissions/codedocs-nano/other-20260101-ffffff/entry.json", "one entry at a time"),
        (f"{ENTRY}/.hidden", "use letters"),
        (f"{ENTRY}/a b.json", "use letters"),
        (f"{ENTRY}/::set-output name=x::\ny", "use letters"),
    ],
)
def test_other_changes_are_refused(repository: Repository, tmp_path: Path, path: str, because: str) -> None:
    alone = because == "exists already"
    if not alone:
        repository.write(f"{ENTRY}/entry.json", "{}")
    repository.write(path, "changed\n")
    done = repository.check(tmp_path / "out")
    assert done.returncode == 1
    assert because in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_a_removed_entry_is_refused(repository: Repository, tmp_path: Path) -> None:
    (repository.folder / f"{Path(ENTRY).parent}/old-20250101-000000/entry.json").unlink()
    assert "only adds" in repository.check(tmp_path / "out").stderr


def test_a_symlink_and_an_executable_are_refused(repository: Repository, tmp_path: Path) -> None:
    link = repository.write(f"{ENTRY}/entry.json", "{}").with_name("passwords")
    link.symlink_to("/etc/passwd")
    assert "mode 120000" in repository.check(tmp_path / "out").stderr
    repository.git("checkout", "--quiet", "pr")
    link.unlink()
    repository.write(f"{ENTRY}/run.sh", "true\n").chmod(0o755)
    assert "mode 100755" in repository.check(tmp_path / "out").stderr


def test_a_huge_entry_is_refused(repository: Repository, tmp_path: Path) -> None:
    with repository.write(f"{ENTRY}/rows.bin", "").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    done = repository.check(tmp_path / "out")
    assert done.returncode == 1 and "67,108,865 bytes" in done.stderr


def test_the_limits_are_those_of_the_verifier() -> None:
    from clbench.leaderboard import submission

    text = SCRIPT.read_text("utf-8")
    limits = dict(re.findall(r"^(MAX_\w+) = (.+)$", text, re.MULTILINE))
    assert int(limits["MAX_FILES"].replace("_", "")) == submission.MAX_FILES
    assert limits["MAX_BYTES"] == f"{submission.MAX_ENTRY_BYTES // 2**20} * 2**20"
