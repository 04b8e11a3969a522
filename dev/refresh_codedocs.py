"""Pin the releases of a codedocs manifest: fill date, file, sha256, size and licence from the package index.

A manifest of either form is rewritten in place. In the full form (``format: 1``) write package and version under each
stage. In the yearly form (``format: 2``) write only packages with their licences; the releases are found:

    python dev/refresh_codedocs.py streams/codedocs_nano.yaml
    python dev/refresh_codedocs.py --years 2008-2026 --until 2026-11-21 streams/codedocs.yaml

Of each year, the newest version that was uploaded then: a final one, not yanked, with a source distribution, and newer
than that of the year before (so a late fix of an old branch does not stand for a year). Releases that say they are
copyleft, whose archives are refused, or that hold next to nothing are left out with a warning. Lines that are there
already are not looked into again. Run it any day: only what is new is fetched.

Whatever else a release says is replaced, but a ``licence`` that is written there stays: releases
often say "BSD" without saying which. Every file is fetched, for what it says about its licence itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import requests
import yaml
from packaging.version import InvalidVersion, Version
from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple
from rich.console import Console
from rich.progress import track

from clbench import index
from clbench.archive import iter_members
from clbench.errors import ClbenchError, NotFoundError
from clbench.files import write_text
from clbench.index import PinnedFile
from clbench.streams.codedocs import LICENCES, Manifest, YearlyManifest, read_release

HEADER = """\
# Releases of the stream {name}: see docs/codedocs.md. Written by dev/refresh_codedocs.py: change packages and
# versions here, then run it again.
"""
YEARLY_HEADER = """\
# Releases of the stream {name}: see docs/codedocs.md. Written by dev/refresh_codedocs.py: change packages
# here, then run it again. A line is: version, day of upload, bytes, sha256, file (and its licence if that is another).
"""
N_THREADS = 4
MIN_DOCUMENTS = 20
"""A release with fewer is no documentation: a place holder, or a project that has not begun."""
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
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


def copyleft(said: Iterable[str]) -> str | None:
    """Return the statement by which a release is under copyleft, if there is one."""
    pattern = r"GPL|General Public|MPL|Mozilla"
    return next((text[:60] for text in said if re.search(pattern, text[:200], re.IGNORECASE)), None)


def families(said: Iterable[str]) -> list[str]:
    """Return the permissive licences that the statements may mean; of BSD's kinds the commoner one."""
    return [name for text in said for pattern, name in _NAMES if re.search(pattern, text[:80], re.IGNORECASE)]


def licence_of(sdist: Path, known: str | None) -> str:
    """Return the licence of a release: ``known`` unless the release contradicts it, else what it says."""
    said = stated_licence(sdist)
    if refused := copyleft(said):
        return refused  # the manifest's check refuses it
    if known in LICENCES:
        return str(known)
    return next(iter(families(said)), (said or ["unknown"])[0][:60])


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


# one release a year


@dataclass(frozen=True)
class Found:
    """A release that stands for a year."""

    version: Version
    date: str
    file: PinnedFile

    def line(self, licence: str = "") -> str:
        """Return its line in a yearly manifest."""
        file = self.file
        return f"{self.version} {self.date} {file.n_bytes} {file.sha256} {file.filename} {licence}".rstrip()


def newest_of_years(package: str, about: dict[str, Any], years: range, until: str) -> list[Found]:
    """Return the release of each year, oldest first; see the module's text for which that is."""
    newest: dict[int, Found] = {}
    for found in _usable(package, about):
        year = int(found.date[:4])
        known = newest.get(year)
        if year in years and found.date <= until and (known is None or _better(found, known)):
            newest[year] = found
    kept: list[Found] = []
    for year in sorted(newest):
        if not kept or newest[year].version > kept[-1].version:
            kept.append(newest[year])
    return kept


def _better(found: Found, known: Found) -> bool:
    """Tell whether to take a file instead of another: a newer version, or a smaller file of the same."""
    if found.version != known.version:
        return found.version > known.version
    return (found.file.n_bytes, found.file.filename) < (known.file.n_bytes, known.file.filename)


def _usable(package: str, about: dict[str, Any]) -> Iterator[Found]:
    """Yield the source distributions of final versions that were not withdrawn."""
    for text, files in about["releases"].items():
        try:
            version = Version(text)
        except InvalidVersion:
            continue
        for file in files:
            usable = file["packagetype"] == "sdist" and not file.get("yanked") and file["filename"].endswith(ARCHIVES)
            if usable and file["size"] and not version.is_prerelease:
                pinned = PinnedFile(
                    project=package,
                    filename=file["filename"],
                    sha256=file["digests"]["sha256"],
                    n_bytes=file["size"],
                )
                yield Found(version, file["upload_time"][:10], pinned)


def problem_of(path: Path, package: str) -> str | None:
    """Return why a fetched release cannot be used; reads it."""
    try:
        n_documents = sum(1 for _ in read_release(path, package))
        said = copyleft(stated_licence(path))
    except ClbenchError as error:
        return str(error)
    if n_documents < MIN_DOCUMENTS:
        return f"it holds {n_documents} documents"
    return f"it says {said!r}" if said else None


def own_licence(path: Path, licence: str) -> str:
    """Return what to write beside a release: its licence if it says another than the package's, else nothing."""
    said = families(stated_licence(path))
    return "" if not said or any(name[:3] == licence[:3] for name in said) else said[0]


def refresh_yearly(path: Path, plan: dict[str, Any], years: str | None, until: str, endpoint: str) -> None:
    """Rewrite a yearly manifest in place."""
    console = Console(stderr=True)
    plan = {**plan, "years": years or plan["years"], "until": until}
    YearlyManifest.model_validate({**plan, "packages": _without_releases(plan["packages"])})
    first, last = map(int, plan["years"].split("-"))
    found: dict[str, list[Found]] = {}
    for package, about in _all_metadata(list(plan["packages"]), endpoint, console):
        since = max(first, plan["packages"][package].get("since", first))
        found[package] = newest_of_years(package, about, range(since, last + 1), until)
    known = {line.split()[3]: line for entry in plan["packages"].values() for line in entry.get("releases") or ()}
    new = [(package, f) for package in found for f in found[package] if f.file.sha256 not in known]
    console.print(f"{sum(map(len, found.values()))} releases, {len(new)} of them new")
    paths = index.fetch([f.file for _, f in new], endpoint=endpoint)
    with ProcessPoolExecutor() as pool:
        checks = pool.map(problem_of, [paths[f.file.filename] for _, f in new], [package for package, _ in new])
        for (package, f), problem in track(zip(new, checks, strict=True), "reading", len(new), console=console):
            if problem:
                console.print(f"left out: {f.file.filename}: {problem}", markup=False, highlight=False, soft_wrap=True)
            else:
                licence = own_licence(paths[f.file.filename], plan["packages"][package]["licence"])
                known[f.file.sha256] = f.line(licence)
    packages = {
        package: {
            **{key: entry[key] for key in ("licence", "since") if key in entry},
            "releases": [known[f.file.sha256] for f in found[package] if f.file.sha256 in known],
        }
        for package, entry in sorted(plan["packages"].items(), key=lambda item: item[0].lower())
    }
    manifest = {**plan, "packages": packages}
    YearlyManifest.model_validate(manifest).written_out()
    text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=1000)
    write_text(path, YEARLY_HEADER.format(name=plan["name"]) + text)


def _without_releases(packages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**entry, "releases": []} for name, entry in packages.items()}


def _all_metadata(packages: list[str], endpoint: str, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the index's JSON about each package, a few at a time."""
    with PyPISimple(endpoint) as client, ThreadPoolExecutor(N_THREADS) as pool:
        answers = pool.map(lambda package: metadata(client, package), packages)
        yield from track(zip(packages, answers, strict=True), "asking the index", len(packages), console=console)


# either form


def refresh(
    path: Path, endpoint: str = PYPI_SIMPLE_ENDPOINT, *, years: str | None = None, until: str | None = None
) -> None:
    """Rewrite one manifest in place; one that does not hold together stays as it was."""
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    if manifest.get("format") == 2:
        return refresh_yearly(path, manifest, years, until or datetime.now(UTC).date().isoformat(), endpoint)
    if years or until:
        raise ClbenchError("--years and --until are for yearly manifests (format: 2)", where=path)
    with PyPISimple(endpoint) as client:
        for stage in track(manifest["stages"], console=Console(stderr=True)):
            stage["releases"] = [pin(client, release) for release in stage["releases"]]
    Manifest.model_validate(manifest)
    text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=110)
    write_text(path, HEADER.format(name=manifest["name"]) + text)
    return None


def main() -> int:
    """Refresh the manifests named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, nargs="+")
    parser.add_argument("--years", help="first and last year of a yearly manifest; those it names by default")
    parser.add_argument("--until", help="last day to look at (2026-11-21); today by default")
    parser.add_argument("--endpoint", default=PYPI_SIMPLE_ENDPOINT, help="base address of the index's simple API")
    arguments = parser.parse_args()
    try:
        for path in arguments.manifest:
            refresh(path, arguments.endpoint, years=arguments.years, until=arguments.until)
    except (ClbenchError, ValueError, requests.RequestException) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
