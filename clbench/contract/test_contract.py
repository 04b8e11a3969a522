"""Collected by ``pytest --pyargs clbench.contract``: one test a check and target."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clbench.contract.plugin import HOW, OPTIONS, targets
from clbench.contract.problems import ContractError, NotChecked, name_of
from clbench.errors import ClbenchError

if TYPE_CHECKING:
    from clbench.contract.lab import Lab

pytestmark = pytest.mark.filterwarnings("default")  # an author's `error` is about the author's code

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of every check for every target of its kind."""
    kind = metafunc.function.__name__.removeprefix("test_")
    if metafunc.config.getoption("clbench_method", default=None) is None:
        raise pytest.UsageError(f"clbench.contract: its plugin is not loaded; run: {HOW} -p clbench.contract.plugin")
    assert kind in OPTIONS
    pairs: list[Any] = [(target, check) for target in targets(metafunc.config, kind) for check in checks_of(kind)]
    ids = [f"{target}-{name_of(check)}" for target, check in pairs]
    nothing = pytest.param("", None, marks=pytest.mark.clbench_nothing)
    metafunc.parametrize(("target", "check"), pairs or [nothing], ids=ids or [kind])


def checks_of(kind: str) -> tuple[Callable[[Any], None], ...]:
    """Return the checks of a kind."""
    if kind == "method":
        from clbench.contract.methods import METHOD_CHECKS

        return METHOD_CHECKS
    if kind == "stream":
        from clbench.contract.streams import STREAM_CHECKS

        return STREAM_CHECKS
    from clbench.contract.suites import SUITE_CHECKS

    return SUITE_CHECKS


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own that shares the user's downloads: nothing that is built here stays."""
    from clbench.home import downloads_folder

    downloads = downloads_folder()
    folder = tmp_path_factory.mktemp("clbench-home")
    if downloads.is_dir():
        (folder / "downloads").symlink_to(downloads.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLBENCH_HOME", str(folder))
        for name, value in SETTINGS.items():
            patch.setenv(name, os.environ.get(name, value))
        yield folder


@pytest.fixture(scope="session")
def lab(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Stream and base of the method and suite checks; one thread, so that equal work gives equal bits."""
    import torch

    from clbench.contract.lab import Lab

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Lab.build(tmp_path_factory.mktemp("clbench-runs"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cases() -> dict[tuple[str, str], Any]:
    """Cases by kind and target: the runs of one method serve all its checks."""
    return {}


def judge(check: Callable[[Any], None], make: Callable[[], Any], cases: dict[Any, Any], key: tuple[str, str]) -> None:
    """Make one check; a broken contract fails with its one line instead of a traceback."""
    __tracebackhide__ = True
    try:
        case = cases.setdefault(key, None) or make()
        cases[key] = case
        check(case)
    except ContractError as error:
        pytest.fail(str(error), pytrace=False)
    except ClbenchError as error:
        pytest.fail(f"{key[0]} {key[1]!r}: {error}", pytrace=False)
    except NotChecked:
        pytest.skip("cannot be checked before what the other checks report is mended")


def test_method(lab: Lab, cases: dict[Any, Any], target: str, check: Callable[[Any], None]) -> None:
    """Check one promise of a method."""
    from clbench.contract.methods import MethodCase

    judge(check, lambda: MethodCase.of(lab, target), cases, ("method", target))


def test_stream(home: Path, cases: dict[Any, Any], target: str, check: Callable[[Any], None]) -> None:
    """Check one promise of a stream source."""
    from clbench.contract.streams import StreamCase

    judge(check, lambda: StreamCase.of(target), cases, ("stream", target))


def test_suite(lab: Lab, cases: dict[Any, Any], target: str, check: Callable[[Any], None]) -> None:
    """Check one promise of a suite."""
    from clbench.contract.suites import SuiteCase

    judge(check, lambda: SuiteCase.of(lab, target), cases, ("suite", target))
