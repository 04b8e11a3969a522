"""Pin the releases of a codedocs manifest: fill date, file, sha256, size and licence from the package index.

Write package and version under each stage, run this, read the difference:

    python dev/refresh_codedocs.py streams/codedocs_nano.yaml

Whatever else a release says is replaced, but a ``licence`` that is written there stays: releases
often say "BSD" without saying which. Every file is fetched, for what it says about its licence itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import requests
import yaml
from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple
from rich.console import Console
from rich.progress import track

from clbench import index
from clbench.archive import iter_members
from clbench.errors import ClbenchError, NotFoundError
from clbench.files import write_text
from clbench.index import PinnedFile
from clbench.streams.codedocs import LICENCES, Manifest

HEADER = """\
# Releases of the stream {name}: see docs/codedocs.md. Written by dev/refresh_codedocs.py: change packages and
# versions here, then run it again.
"""
_NAMES = (
    (r"apache", "Apache-2.0"),
    (r"BSD-2", "BSD-2-Clause"),
    (r"BSD", "BSD-3-Clause"),
    (r"MIT", "MIT"),
    (r"PSF|Python Software Foundation", "PSF-2.0"),
)


def stated_licence(sdist: Path) -> list[str]:
    """Return what a release itself says about its licence: old ones may have another than the newest."""
    for member in iter_members(sdist, lambda name: name.count("/") == 1 and name.endswith("/PKG-INFO")):
        about = BytesParser().parsebytes(member.data)
        said = [
            *about.get_all("License-Expression", ()),
            *about.get_all("Classifier", ()),
            *about.get_all("License", ()),
        ]
        return [str(text) for text in said if "License ::" in text or not re.search("::|UNKNOWN", text)]
    return []


def licence_of(sdist: Path, known: str | None) -> str:
    """Return the licence of a release: ``known`` unless the release contradicts it, else what it says."""
    said = stated_licence(sdist)
    for text in said:
        if re.search(r"GPL|General Public|MPL|Mozilla", text[:200], re.IGNORECASE):
            return text[:60]  # the manifest's check refuses it
    if known in LICENCES:
        return str(known)
    found = (name for text in said for pattern, name in _NAMES if re.search(pattern, text[:80], re.IGNORECASE))
    return next(found, (said or ["unknown"])[0][:60])


def metadata(client: PyPISimple, package: str) -> dict[str, Any]:
    """Return the index's JSON about a package."""
    answer = client.s.get(urljoin(client.endpoint, f"../pypi/{package}/json"), timeout=60)
    if answer.status_code == 404:
        raise NotFoundError("no such package on the index", where=package, mend="mend its name in the manifest")
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def pin(client: PyPISimple, release: dict[str, Any]) -> dict[str, Any]:
    """Return a release with all its fields, and fetch it; of several source distributions the smallest."""
    package, version = release["package"], str(release["version"])
    files = metadata(client, package)["releases"].get(version, [])
    sdists = [file for file in files if file["packagetype"] == "sdist"]
    if not sdists:
        raise NotFoundError("no source distribution", where=f"{package} {version}", mend="choose another version")
    chosen = min(sdists, key=lambda file: int(file["size"]))
    pinned = PinnedFile(
        project=package, filename=chosen["filename"], sha256=chosen["digests"]["sha256"], n_bytes=chosen["size"]
    )
    path = index.fetch([pinned], endpoint=client.endpoint)[pinned.filename]
    return {
        "package": package,
        "version": version,
        "date": chosen["upload_time"][:10],
        "licence": licence_of(path, release.get("licence")),
        "file": pinned.filename,
        "sha256": pinned.sha256,
        "n_bytes": pinned.n_bytes,
    }


def refresh(path: Path, endpoint: str = PYPI_SIMPLE_ENDPOINT) -> None:
    """Rewrite one manifest in place; one that does not hold together stays as it was."""
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    with PyPISimple(endpoint) as client:
        for stage in track(manifest["stages"], console=Console(stderr=True)):
            stage["releases"] = [pin(client, release) for release in stage["releases"]]
    Manifest.model_validate(manifest)
    text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=110)
    write_text(path, HEADER.format(name=manifest["name"]) + text)


def main() -> int:
    """Refresh the manifests named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, nargs="+")
    parser.add_argument("--endpoint", default=PYPI_SIMPLE_ENDPOINT, help="base address of the index's simple API")
    arguments = parser.parse_args()
    try:
        for path in arguments.manifest:
            refresh(path, arguments.endpoint)
    except (ClbenchError, ValueError, requests.RequestException) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
