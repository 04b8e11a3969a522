"""Take a leaderboard submission out of a pull request, as data.

The check of submissions runs this from the *base* branch's checkout. It compares the pull request's head with
the point where it left the base, refuses anything but new plain files under one new folder

    leaderboard/submissions/<track>/<entry>/

and writes those files below ``--out``. It prints that folder's path, for ``clbench leaderboard verify`` to
read. It runs nothing from the pull request, writes nowhere else, needs only git and the standard library.

Exit codes: 0 written; 1 the pull request changes something else; 2 wrong use.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = "leaderboard/submissions"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
PLAIN_FILE = "100644"
MAX_FILES = 1000
MAX_BYTES = 64 * 2**20


class RefusedError(Exception):
    """The pull request changes something that a submission may not."""


@dataclass(frozen=True)
class Change:
    """One changed path: git's status letter, the new mode and blob, and the path."""

    status: str
    mode: str
    blob: str
    path: str

    @property
    def shown(self) -> str:
        """The path in plain ASCII: a name is untrusted, and a log must not obey it."""
        return ascii(self.path)


def git(*words: str) -> bytes:
    """Run git in the current folder and return what it printed."""
    return subprocess.run(["git", *words], check=True, capture_output=True).stdout


def changes(base: str, head: str) -> list[Change]:
    """List what head changed since it left base (their merge base: newer work on base is not its doing)."""
    raw = git("diff", "--raw", "-z", "--no-renames", "--no-abbrev", f"{base}...{head}", "--")
    fields = raw.decode("utf-8", "backslashreplace").split("\0")
    found = []
    for facts, path in zip(fields[0::2], fields[1::2], strict=False):
        _, mode, _, blob, status = facts.split(" ")
        found.append(Change(status, mode, blob, path))
    return found


def entry_folder(found: list[Change]) -> str:
    """Return the one new folder that all changes lie in, or raise RefusedError naming what does not fit."""
    folders = set()
    for change in found:
        parts = change.path.split("/")
        if change.path != "/".join([FOLDER, *parts[2:]]) or len(parts) < 5:
            raise RefusedError(
                f"{change.shown} is not below {FOLDER}/<track>/<entry>/; send it as a pull request of its own"
            )
        if not all(NAME.fullmatch(part) for part in parts[2:]):
            raise RefusedError(f"{change.shown}: use letters, digits and . _ + = - in names, at most 100 of them")
        if change.status != "A":
            raise RefusedError(f"{change.shown} changes or removes an entry; a submission only adds one")
        if change.mode != PLAIN_FILE:
            raise RefusedError(f"{change.shown} has mode {change.mode}; only plain files, no links, nothing executable")
        folders.add("/".join(parts[:4]))
    if not folders:
        raise RefusedError("no file changed")
    if len(folders) > 1:
        raise RefusedError(f"files of {len(folders)} entries ({', '.join(sorted(folders))}); send one entry at a time")
    if len(found) > MAX_FILES:
        raise RefusedError(f"{len(found)} files; at most {MAX_FILES} make an entry")
    return folders.pop()


def take_out(base: str, head: str, out: Path) -> Path:
    """Write the submission's files below out, by their paths in the tree.

    Returns:
        The entry's folder.

    Raises:
        RefusedError: something else was changed, the entry exists on base already, or it is too large.
    """
    found = changes(base, head)
    folder = entry_folder(found)
    if git("ls-tree", base, "--", folder):
        raise RefusedError(f"{folder} exists already; give a new entry a new name")
    n_bytes = sum(int(git("cat-file", "-s", change.blob)) for change in found)
    if n_bytes > MAX_BYTES:
        raise RefusedError(f"{n_bytes:,} bytes; at most {MAX_BYTES:,} make an entry")
    for change in found:
        target = out / change.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(git("cat-file", "blob", change.blob))
    return out / folder


def main() -> int:
    """Read the command line, take the submission out, print its folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="commit of the base branch")
    parser.add_argument("--head", required=True, help="commit or ref of the pull request")
    parser.add_argument("--out", required=True, type=Path, help="empty folder to write to, outside the checkout")
    options = parser.parse_args()
    try:
        print(take_out(options.base, options.head, options.out))
    except RefusedError as refused:
        print(f"submission refused: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
