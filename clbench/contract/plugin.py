"""Pytest options of the contract suite; loaded through the entry-point group ``pytest11``.

Pytest loads this in every run of everyone who installed clbench, so it imports nothing and registers nothing unless
``clbench.contract`` stands on the command line: ``--method`` must stay free for other people's suites.
"""

from __future__ import annotations

import pytest

OPTIONS = {
    "method": "NAME, NAME:option=value, my/file.py[:Class] or package.module:Class; repeatable",
    "stream": "NAME, my/file.py[:Class] or package.module:Class; repeatable",
    "suite": "NAME, my/file.py[:Class] or package.module:Class; repeatable",
}
HOW = "pytest --pyargs clbench.contract --method my_method.py:MyMethod"


def asked(args: list[str]) -> bool:
    """Return whether a command line asks for the contract suite."""
    return any("clbench.contract" in arg.replace("/", ".") for arg in args if not arg.startswith("-"))


def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Register the options, before the command line is read for good."""
    if not asked([arg for before, arg in zip(["", *args], args, strict=False) if before != "-p"]):
        return
    group = parser.getgroup("clbench.contract", "clbench contract suite")
    for name, text in OPTIONS.items():
        group.addoption(
            f"--{name}",
            action="append",
            default=[],
            metavar="TARGET",
            dest=f"clbench_{name}",
            help=f"the {name} to check: {text}",
        )


def targets(config: pytest.Config, kind: str) -> list[str]:
    """Return what the command line asks to check."""
    given: list[str] = config.getoption(f"clbench_{kind}", default=None) or []
    return given


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run that would check nothing, and let the suite be collected whatever the user's naming rules are."""
    if config.getoption("clbench_method", default=None) is None or config.option.help:
        return
    if not any(targets(config, kind) for kind in OPTIONS):
        raise pytest.UsageError(f"clbench.contract: nothing to check; say what, for example: {HOW}")
    config.addinivalue_line("markers", "clbench_nothing: a kind of content that nobody asked to check")
    config.addinivalue_line("python_files", "test_contract.py")
    config.addinivalue_line("python_functions", "test_")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Refuse a target that cannot be found or imported, once and before anything is built."""
    if any(targets(session.config, kind) for kind in OPTIONS):
        from contextlib import suppress

        from clbench import registry
        from clbench.errors import ClbenchError

        try:
            for target in targets(session.config, "method"):
                with suppress(AttributeError, TypeError):  # a constructor that fails: a check says so
                    registry.make_method(target)
            for target in targets(session.config, "stream"):
                with suppress(AttributeError, TypeError):
                    registry.make_stream_source(target)
            for target in targets(session.config, "suite"):
                registry.load_class("suites", target)
        except ClbenchError as error:
            raise pytest.UsageError(f"clbench.contract: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the kinds that nobody asked to check; pytest would call them skipped."""
    if not any(targets(config, kind) for kind in OPTIONS):
        return
    empty = [item for item in items if item.get_closest_marker("clbench_nothing")]
    items[:] = [item for item in items if item not in empty]
