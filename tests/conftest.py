"""What every test stands on: its own cache folder, no network beyond this machine, quiet libraries."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from clbench.build import build_stream
from clbench.stream import Stream
from clbench.streams.tinydocs import Tinydocs

# No test is timed: a busy machine is slow, and that says nothing about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
os.environ.update(ENVIRONMENT)  # before any test imports a library that reads them; subprocesses inherit them
# A shell starts background jobs with Ctrl-C ignored, which subprocesses would inherit; tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def clbench_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's cache folder, so that no test reads or writes the developer's own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLBENCH_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tinydocs(clbench_home: Path) -> Stream:
    """The built stream ``tinydocs``: 4 stages, about 48 train and 12 held-out documents in each."""
    return build_stream(Tinydocs(), progress=False)


def is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a path, or a loopback host."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    if isinstance(host, bytes):
        host = host.decode()
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail every connection that leaves this machine (in this process; subprocesses are not guarded)."""

    def guarded(real: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if not is_local(address):
                raise PermissionError(f"a test tried to reach {address!r}: tests run without network")
            return real(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Equal numbers of threads give equal bits; torch is not imported for tests that do without it."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)
