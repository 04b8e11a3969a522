from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clbench import files as clbench_files
from clbench import index
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError, OfflineError
from clbench.index import PinnedFile, fetch, missing
from tests.index_server import IndexServer, index_server

FAST = (0.01, 0.01)
DATA = bytes(range(256)) * 1000


@pytest.fixture
def server() -> Iterator[IndexServer]:
    with index_server() as state:
        yield state


@pytest.fixture(autouse=True)
def _network_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLBENCH_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("pep691", [False, True])
def test_files_of_several_projects_arrive_whole(server: IndexServer, tmp_path: Path, pep691: bool) -> None:
    server.pep691 = pep691
    pins = [server.add(f"project{i % 7}", f"file-{i}.tar.gz", DATA + bytes([i])) for i in range(20)]
    paths = fetch(pins, folder=tmp_path, endpoint=server.endpoint)
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        f"file-{i}.tar.gz": DATA + bytes([i]) for i in range(20)
    }
    assert sum(n for path, n in server.asked.items() if path.startswith("/simple/")) == 7


def test_default_folder_is_the_downloads_folder(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    pin = server.add("a", "a-1.zip", DATA)
    assert fetch([pin], endpoint=server.endpoint)["a-1.zip"] == tmp_path / "home" / "downloads" / "a-1.zip"


def test_what_is_complete_is_never_fetched_again(server: IndexServer, tmp_path: Path) -> None:
    first, second = server.add("a", "a-1.tar.gz", b"one"), server.add("a", "a-2.tar.gz", b"two")
    fetch([first], folder=tmp_path, endpoint=server.endpoint)
    fetch([first, second], folder=tmp_path, endpoint=server.endpoint)
    fetch([first, second], folder=tmp_path, endpoint=server.endpoint)
    assert (server.asked["/files/a-1.tar.gz"], server.asked["/files/a-2.tar.gz"]) == (1, 1)


def test_a_damaged_file_in_the_cache_is_replaced(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    (tmp_path / "a-1.tar.gz").write_bytes(DATA[:-1] + b"x")
    assert missing([pin], tmp_path) == [pin]
    assert fetch([pin], folder=tmp_path, endpoint=server.endpoint)["a-1.tar.gz"].read_bytes() == DATA


def test_other_bytes_than_pinned_are_refused_and_not_kept(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.files["a-1.tar.gz"] = ("a", DATA[::-1])
    with pytest.raises(IntegrityError, match=r"a-1\.tar\.gz"):
        fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert contents(tmp_path) == []
    assert server.asked["/files/a-1.tar.gz"] == 1, "wrong bytes are no network trouble: no second attempt"


def test_a_download_that_is_too_long_is_cut_off(server: IndexServer, tmp_path: Path) -> None:
    pin = replace(server.add("a", "a-1.tar.gz", DATA * 40), n_bytes=1000)
    with pytest.raises(IntegrityError, match="longer than 1000 bytes"):
        fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("declare_length", [True, False])
def test_a_truncated_download_is_tried_again(server: IndexServer, tmp_path: Path, declare_length: bool) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.declare_length = declare_length
    server.truncate["a-1.tar.gz"] = 2
    paths = fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert paths["a-1.tar.gz"].read_bytes() == DATA
    assert server.asked["/files/a-1.tar.gz"] == 3


def test_a_download_that_stays_truncated_fails_and_leaves_nothing(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.truncate["a-1.tar.gz"] = 99
    with pytest.raises(OfflineError, match=r"a-1\.tar\.gz.*copy them into"):
        fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert server.asked["/files/a-1.tar.gz"] == 3
    assert contents(tmp_path) == []


@pytest.mark.parametrize("path", ["/simple/a/", "/files/a-1.tar.gz"])
@pytest.mark.parametrize("failure", [0, 429, 500, 503])
def test_failures_that_pass_are_waited_out(server: IndexServer, tmp_path: Path, path: str, failure: int) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.failures[path] = [failure, failure]
    fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert (tmp_path / "a-1.tar.gz").read_bytes() == DATA
    assert server.asked[path] == 3


def test_pauses_follow_the_delays_and_the_server(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.failures["/files/a-1.tar.gz"] = [503, 503]
    started = time.monotonic()
    fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=(0.1, 0.2))
    assert 0.3 <= time.monotonic() - started < 2
    server.failures["/files/a-2.tar.gz"], server.retry_after = [429], "1"
    started = time.monotonic()
    fetch([server.add("a", "a-2.tar.gz", DATA)], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert time.monotonic() - started >= 1
    assert list(index.RETRY_DELAYS_SECONDS) == [0.5 * 2**i for i in range(len(index.RETRY_DELAYS_SECONDS))]


def test_a_refusal_is_not_repeated(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    server.failures["/simple/a/"] = [403] * 9
    with pytest.raises(OfflineError, match="status 403"):
        fetch([pin], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)
    assert server.asked["/simple/a/"] == 1


def test_unknown_project_and_unknown_file(server: IndexServer, tmp_path: Path) -> None:
    pin = server.add("a", "a-1.tar.gz", DATA)
    for absent in (replace(pin, project="b"), replace(pin, filename="a-9.tar.gz")):
        with pytest.raises(NotFoundError, match=absent.filename):
            fetch([absent], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=FAST)


def test_one_failure_stops_the_others_and_keeps_what_is_done(server: IndexServer, tmp_path: Path) -> None:
    good = server.add("a", "a-1.tar.gz", DATA)
    fetch([good], folder=tmp_path, endpoint=server.endpoint)
    bad = replace(server.add("b", "b-1.tar.gz", DATA), sha256="0" * 64)
    slow = [server.add(f"slow{i}", f"slow{i}-1.zip", DATA) for i in range(12)]
    for pin in slow:
        server.failures[f"/simple/{pin.project}/"] = [503]
    started = time.monotonic()
    with pytest.raises(IntegrityError, match="b-1"):
        fetch([good, bad, *slow], folder=tmp_path, endpoint=server.endpoint, retry_delays_seconds=(30.0,))
    assert time.monotonic() - started < 10, "a thread in a pause has to wake up"
    assert contents(tmp_path) == ["a-1.tar.gz"]


def test_no_server_is_offline_with_a_remedy(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}/simple/"
        pin = PinnedFile(project="a", filename="a-1.tar.gz", sha256="0" * 64, n_bytes=3)
        with pytest.raises(OfflineError) as caught:
            fetch([pin], folder=tmp_path, endpoint=endpoint, retry_delays_seconds=FAST)
    assert "a-1.tar.gz" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_mode_asks_nobody_but_accepts_what_is_there(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = server.add("a", "a-1.tar.gz", DATA), server.add("a", "a-2.tar.gz", DATA)
    fetch([first], folder=tmp_path, endpoint=server.endpoint)
    before = server.asked.total()
    monkeypatch.setenv("CLBENCH_OFFLINE", "1")
    assert fetch([first], folder=tmp_path, endpoint=server.endpoint)["a-1.tar.gz"].is_file()
    with pytest.raises(OfflineError, match=r"CLBENCH_OFFLINE.*a-2\.tar\.gz"):
        fetch([first, second], folder=tmp_path, endpoint=server.endpoint)
    assert server.asked.total() == before
    monkeypatch.setenv("CLBENCH_OFFLINE", "0")
    fetch([second], folder=tmp_path, endpoint=server.endpoint)


def test_leftovers_of_a_killed_download_are_removed(server: IndexServer, tmp_path: Path) -> None:
    (tmp_path / ".a-1.tar.gz.x1y2.tmp").write_bytes(DATA[:10])
    fetch([server.add("a", "a-1.tar.gz", DATA)], folder=tmp_path, endpoint=server.endpoint)
    assert contents(tmp_path) == ["a-1.tar.gz"]


def test_two_at_the_same_time_fetch_each_file_once(server: IndexServer, tmp_path: Path) -> None:
    """The second finds everything missing, waits for the lock, and then finds everything there."""
    pins = [server.add("a", f"a-{i}.tar.gz", DATA) for i in range(5)]
    server.failures["/files/a-4.tar.gz"] = [503]
    arguments = {"folder": tmp_path, "endpoint": server.endpoint, "retry_delays_seconds": (0.5,)}
    first, second = (threading.Thread(target=fetch, args=(pins,), kwargs=arguments) for _ in range(2))
    first.start()
    while not server.asked["/simple/a/"]:
        time.sleep(0.001)
    second.start()
    for thread in (first, second):
        thread.join()
    assert contents(tmp_path) == [pin.filename for pin in pins]
    assert [server.asked[f"/files/{pin.filename}"] for pin in pins] == [1, 1, 1, 1, 2]


def test_a_full_disk_is_said_and_leaves_nothing(
    server: IndexServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clbench_files, "fsync", no_space)
    with pytest.raises(ClbenchError, match="disk is full"):
        fetch([server.add("a", "a-1.tar.gz", DATA)], folder=tmp_path, endpoint=server.endpoint)
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [{"filename": "../a.zip"}, {"filename": "a/b.zip"}, {"filename": ".hidden"}, {"sha256": "12"}, {"n_bytes": 0}],
)
def test_a_pin_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    right: dict[str, object] = {"project": "a", "filename": "a-1.zip", "sha256": "0" * 64, "n_bytes": 1}
    with pytest.raises(ConfigError):
        PinnedFile(**{**right, **change})  # type: ignore[arg-type]
