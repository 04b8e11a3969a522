from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from clbench.archive import Limits, iter_members
from clbench.errors import ConfigError, IntegrityError

FILES = {"pkg-1/a.py": b'"""A."""\n', "pkg-1/sub/b.txt": b"text " * 5000, "pkg-1/empty.py": b""}


def tar_bytes(files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return buffer.getvalue()


def write_archive(path: Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}[path.suffix]
    with tarfile.open(path, mode) as target:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
        for info in extra:
            target.addfile(info)
    return path


def read(path: Path, limits: Limits | None = None) -> dict[str, bytes]:
    return {member.name: member.data for member in iter_members(path, limits=limits)}


KINDS = ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_regular_files_come_out_as_they_are(tmp_path: Path, kind: str) -> None:
    assert read(write_archive(tmp_path / kind, FILES)) == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_only_wanted_members_are_given(tmp_path: Path, kind: str) -> None:
    path = write_archive(tmp_path / kind, FILES)
    assert [m.name for m in iter_members(path, lambda name: name.endswith(".txt"))] == ["pkg-1/sub/b.txt"]


def test_a_leading_dot_is_no_part_of_the_name(tmp_path: Path) -> None:
    assert read(write_archive(tmp_path / "a.tar.gz", {"./pkg-1//a.py": b"x"})) == {"pkg-1/a.py": b"x"}


@pytest.mark.parametrize("kind", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("name", ["../evil.py", "pkg/../../evil.py", "/etc/evil.py", "C:/evil.py", "a\\..\\evil.py"])
def test_a_path_that_escapes_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / kind
    write_archive(path, {"pkg/good.py": b"x", name: b"x"})
    with pytest.raises(IntegrityError, match=kind):
        read(path)
    assert [p.name for p in tmp_path.iterdir()] == [kind], "nothing may be unpacked"


def test_links_and_devices_in_a_tar_are_skipped(tmp_path: Path) -> None:
    extra: list[tarfile.TarInfo] = []
    for kind, target in [
        (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "pkg-1/a.py"), (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""), (tarfile.DIRTYPE, ""),
    ]:  # fmt: skip
        info = tarfile.TarInfo(f"pkg-1/special{len(extra)}.py")
        info.type, info.linkname = kind, target
        extra.append(info)
    assert read(write_archive(tmp_path / "a.tar.gz", FILES, tuple(extra))) == FILES


def test_a_link_in_a_zip_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/a.py", "x")
        link = zipfile.ZipInfo("pkg/link.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert read(path) == {"pkg/a.py": b"x"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_noticed(tmp_path: Path, kind: str) -> None:
    files = {f"pkg/{i}.txt": bytes((i * j) % 251 for j in range(3000)) for i in range(4)}
    whole = write_archive(tmp_path / kind, files).read_bytes()
    for length in [0, 1, 10, *range(20, len(whole), max(1, len(whole) // 25)), len(whole) - 1]:
        (tmp_path / kind).write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match=kind):
            read(tmp_path / kind)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    for kind in ("a.tar.gz", "a.zip"):
        data = bytearray(write_archive(tmp_path / kind, FILES).read_bytes())
        data[len(data) // 3] ^= 4
        (tmp_path / kind).write_bytes(data)
        with pytest.raises(IntegrityError, match=kind):
            read(tmp_path / kind)


def test_something_else_than_an_archive(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).write_bytes(b"<html>log in to this network</html>" * 40)
        with pytest.raises(IntegrityError, match=kind):
            read(tmp_path / kind)
    with pytest.raises(ConfigError, match=r"a\.rar"):
        read(tmp_path / "a.rar")


@pytest.mark.parametrize("kind", ["bomb.tar.gz", "bomb.tar.bz2", "bomb.zip"])
def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path, kind: str) -> None:
    path = write_archive(tmp_path / kind, {"pkg/zeros.txt": bytes(60_000_000)})
    assert path.stat().st_size < 100_000
    for wanted in (True, False):
        with pytest.raises(IntegrityError, match=r"more than it weighs|more than 33554432"):
            list(iter_members(path, lambda name, wanted=wanted: wanted))  # type: ignore[misc]


def test_a_bomb_of_many_small_members_is_refused(tmp_path: Path) -> None:
    files = {f"pkg/{i}.txt": b"" for i in range(300)}
    for kind in ("a.tar.gz", "a.zip"):
        path = write_archive(tmp_path / kind, files)
        assert len(read(path, Limits(n_members=300))) == 300
        with pytest.raises(IntegrityError, match="more than 299 members"):
            read(path, Limits(n_members=299))


def test_a_member_over_the_limit_matters_only_if_wanted(tmp_path: Path) -> None:
    for kind in ("a.tar.gz", "a.zip"):
        path = write_archive(tmp_path / kind, FILES)
        limits = Limits(member_bytes=1000)
        with pytest.raises(IntegrityError, match=r"sub/b\.txt"):
            read(path, limits)
        assert list(iter_members(path, lambda name: name.endswith("a.py"), limits))


def test_total_and_ratio_limits_count_unpacked_bytes(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.zip", FILES)
    total = sum(map(len, FILES.values()))
    assert read(path, Limits(total_bytes=total)) == FILES
    with pytest.raises(IntegrityError, match="more than it weighs"):
        read(path, Limits(total_bytes=total - 1))
    with pytest.raises(IntegrityError, match="more than it weighs"):
        read(path, Limits(ratio=10, ratio_free_bytes=0))


def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.zip", {"pkg/a.txt": bytes(5000)})
    data = path.read_bytes().replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"a\.zip"):
        read(path)


def test_a_tar_that_promises_more_than_it_has_is_refused(tmp_path: Path) -> None:
    raw = tar_bytes({"pkg/a.txt": b"x" * 100})
    info = tarfile.TarInfo("pkg/a.txt")
    info.size = 10_000_000
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + raw[512:]))
    with pytest.raises(IntegrityError, match=r"a\.tar\.gz"):
        read(path)
