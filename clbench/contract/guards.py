"""What checks look at from outside: the global random states, and attempts to use the network."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of the global generators of torch, numpy and Python, comparable with ``==``."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  (this looks at the global generator, to see it untouched)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "random": random.getstate(),
    }


def moved(before: dict[str, Any]) -> list[str]:
    """Return whose global generator was used since ``before``."""
    now = random_states()
    return [library for library in before if before[library] != now[library]]


@contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuse every way out of this process through a socket; yields the addresses that were tried."""
    tried: list[str] = []

    def refuse(name: str) -> Any:
        def call(*arguments: Any, **_: Any) -> Any:
            given = [a for a in arguments if not isinstance(a, socket.socket)]
            tried.append(f"{name}{tuple(given[:2])}")
            raise OSError(f"clbench.contract: no network here, {tried[-1]}")

        return call

    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    lookup = socket.getaddrinfo
    try:
        for name in real:
            setattr(socket.socket, name, refuse(name))
        socket.getaddrinfo = refuse("getaddrinfo")
        yield tried
    finally:
        for name, function in real.items():
            setattr(socket.socket, name, function)
        socket.getaddrinfo = lookup
