"""The way to a data set: over the network or in a local folder, through the same call of ``datasets``.

``open_rows`` is that call. Everything that can go wrong on the way is one line for people. Which rows are
wanted is left to ``_hub_rows``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench import index
from clbench.errors import ClbenchError, ConfigError, IntegrityError, NotFoundError, OfflineError, did_you_mean
from clbench.files import CHUNK_BYTES, digest_of, sha256_bytes, sha256_file
from clbench.streams._hub_options import COMMIT, Place, read_filter

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000
PROBE_SECONDS = 10.0
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
NETWORK_LIBRARIES = frozenset({"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"})
MEND_OFFLINE = (
    "connect, or name a mirror in HF_ENDPOINT, or give a copy of the data set in the hub's layout with `local_folder`"
)


@dataclass(frozen=True)
class Spot:
    """Where a place is read: a folder on this machine, or an id and a commit."""

    path: str
    commit: str | None

    @property
    def is_local(self) -> bool:
        """Whether no network is needed."""
        return self.commit is None


def local_folder_of(place: Place, local_folder: str, *, alone: bool) -> Path | None:
    """Return the folder that a data set lies in, or None: it has to come from the hub.

    Raises:
        NotFoundError: there should be one, and it is not there.
    """
    if place.is_local:
        tried = [Path(place.dataset).expanduser()]
    elif local_folder:
        root = Path(local_folder).expanduser()
        tried = [root / place.dataset, *([root] if alone else [])]
    else:
        return None
    for folder in tried:
        if folder.is_dir():
            return folder.resolve()
    raise NotFoundError(
        f"there is no local copy of {place.dataset}", where=tried[0].absolute(), mend="mend the path, or bring it there"
    )


def files_digest(folder: Path) -> str:
    """Return what identifies the files of a local copy: their names and sizes, and their content.

    Of a Parquet file of more than 2 MiB only the first and the last MiB are read: its end holds size, offset and
    statistics of every column chunk, and a copy of a whole data set may have terabytes.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(folder))]
    found = [[p.relative_to(folder).as_posix(), p.stat().st_size, _file_digest(p)] for p in files]
    return digest_of(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_digest(path: Path) -> str:
    if path.suffix != ".parquet" or path.stat().st_size <= 2 * CHUNK_BYTES:
        return sha256_file(path)
    with path.open("rb") as file:
        first = file.read(CHUNK_BYTES)
        file.seek(-CHUNK_BYTES, os.SEEK_END)
        return sha256_bytes(first + file.read(CHUNK_BYTES))


def forbid_if_offline(dataset: str) -> None:
    """Refuse to go on where the environment forbids the network.

    Raises:
        OfflineError: says which variable.
    """
    forbidding = [name for name in OFFLINE_VARIABLES if _is_set(name)]
    if index.is_offline():
        forbidding.append("CLBENCH_OFFLINE")
    if forbidding:
        raise OfflineError(
            f"{dataset} has to be fetched from the model hub and {forbidding[0]} forbids the network",
            mend=f"unset it and {MEND_OFFLINE}",
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def commit_of(place: Place, *, unpinned: bool) -> str:
    """Ask the hub for the commit that a revision means; one request, no retries.

    Raises:
        OfflineError: no hub answers.
        NotFoundError: the hub has no such data set or revision, or keeps it for those who asked.
        ConfigError: the revision is no commit (a frozen stream needs one), or the data set is a program.
    """
    if Path(place.dataset).exists():
        # datasets would read it in place of the data set of that name, without a word.
        raise ConfigError(
            f"a folder called {place.dataset} lies here, and the id means it too",
            where=Path.cwd(),
            mend=f"run the command elsewhere, or write ./{place.dataset} if you mean the folder",
        )
    if COMMIT.fullmatch(place.revision) or unpinned:
        return _ask_for_commit(place)
    named = f"revision {place.revision!r} can move" if place.revision else "no revision is given"
    try:
        now = f"what it is now: `revision: {_ask_for_commit(place)}`"
    except OfflineError:
        now = "40 digits from the data set's history; no hub is in reach here to look it up"
    raise ConfigError(
        f"{named}, and a frozen stream needs a commit",
        where=place.dataset,
        mend=f"write {now}; or `unpinned: true` if the stream need not stay the same",
    )


def _ask_for_commit(place: Place) -> str:
    """Return the commit that the hub names for a revision."""
    forbid_if_offline(place.dataset)
    from huggingface_hub import HfApi

    with explained(place):
        found = HfApi().dataset_info(place.dataset, revision=place.revision or None, timeout=PROBE_SECONDS)
    _refuse_scripts(place, [str(sibling.rfilename) for sibling in found.siblings or []])
    return str(found.sha)


def _refuse_scripts(place: Place, names: list[str]) -> None:
    script = f"{place.dataset.rpartition('/')[2]}.py"
    if script in names:
        raise _script_error(place, script)


def _script_error(place: Place, script: str) -> ConfigError:
    return ConfigError(
        f"{place.dataset} is a program ({script}), and foreign programs are not run",
        mend="choose a data set of plain files (Parquet, JSONL, CSV)",
    )


def open_rows(place: Place, spot: Spot) -> Any:
    """Return the rows of a place as a streaming data set of ``datasets``, with only the columns that are needed.

    Raises:
        ConfigError: there is no such configuration, split, file or column.
        OfflineError: the hub does not answer.
    """
    import datasets

    needed = dict.fromkeys((*place.columns.needed(), *(read_filter(text).column for text in place.filters)))
    arguments: dict[str, Any] = {"split": place.split, "revision": spot.commit, "streaming": True}
    if place.data_files:
        arguments["data_files"] = list(place.data_files)
    with quiet(), explained(place, spot):
        try:
            rows = datasets.load_dataset(spot.path, place.config, columns=list(needed), **arguments)
            if rows.features is not None and set(needed) <= set(rows.features):
                return rows
        except (TypeError, ValueError) as error:
            # Only Parquet knows `columns`, and not every version of it beside features that a card declares. Beside it
            # an unknown configuration is taken for a new one without files: the plain call below says what is wrong.
            if "column" not in str(error) and "data file must be specified" not in str(error):
                raise
        return datasets.load_dataset(spot.path, place.config, **arguments)


def tables(place: Place, spot: Spot, piece: int) -> Iterator[pa.Table]:
    """Yield the rows of one piece of a place, in the data set's order.

    A place falls into pieces along its files: piece 2 of 10 holds the third tenth of them.

    Raises:
        OfflineError: the connection was cut.
        IntegrityError: a file is damaged.
        ConfigError, NotFoundError: see ``open_rows``.
    """
    rows = open_rows(place, spot)
    n_pieces = min(place.pieces, rows.n_shards)
    if piece >= n_pieces:
        return
    if n_pieces > 1:
        rows = rows.shard(num_shards=n_pieces, index=piece)
    batches = iter(rows.with_format("arrow").iter(batch_size=BATCH_ROWS))
    while True:
        with quiet(), explained(place, spot):
            table = next(batches, None)
        if table is None:
            return
        yield table


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from talking: what matters of it is said in our own words."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    loggers = (datasets.logging, hub_logging)
    before = [logger.get_verbosity() for logger in loggers]
    had_bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.set_verbosity(50)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.set_verbosity(level)
        if not had_bars:
            datasets.enable_progress_bars()


@contextmanager
def explained(place: Place, spot: Spot | None = None) -> Iterator[None]:
    """Turn what the libraries raise into one line; what is not understood goes through."""
    try:
        yield
    except ClbenchError:
        raise
    except Exception as error:
        if (said := _in_words(place, spot, error)) is None:
            raise
        raise said from error


def _in_words(place: Place, spot: Spot | None, error: Exception) -> ClbenchError | None:
    """Return what an exception of ``datasets``, the hub's client or pyarrow means, or None."""
    text = " ".join(str(error).split())
    if (said := _layout_error(place, spot, error, text) or _hub_error(place, error, text)) is not None:
        return said
    if _is_network_error(error):
        cut = "no model hub answers" if spot is None else "the connection to the model hub was cut"
        mend = MEND_OFFLINE if spot is None else "run the same command again: what is finished stays"
        return OfflineError(f"{cut} ({_short(text)})", where=place.dataset, mend=mend)
    if type(error).__module__.startswith("pyarrow") or isinstance(error, UnicodeDecodeError):
        mend = "bring the file again" if spot is not None and spot.is_local else "tell those who keep the data set"
        return IntegrityError(f"a file cannot be read: {_short(text)}", where=place, mend=mend)
    return None


def _layout_error(place: Place, spot: Spot | None, error: Exception, text: str) -> ClbenchError | None:
    """Return the error for a configuration, split or file that a data set does not have, or a program."""
    if script := re.search(r"scripts are no longer supported, but found (\S+)", text):
        return _script_error(place, script[1])
    if "Config name is missing" in text or re.search(r"BuilderConfig .* not found", text):
        known = re.findall(r"'([^']+)'", text.partition("[")[2])
        if place.config is None:
            mend = f"write `config:` with one of {', '.join(known)}"
            return ConfigError("the data set has several configurations", where=place.dataset, mend=mend)
        return ConfigError(
            f"there is no configuration {place.config!r}", where=place.dataset, mend=did_you_mean(place.config, known)
        )
    if bad_split := re.search(r"[Bb]ad split: .*Available splits: (.*)", text):
        known = re.findall(r"'([^']+)'", bad_split[1])
        return ConfigError(f"there is no split {place.split!r}", where=place, mend=did_you_mean(place.split, known))
    missing = {"DataFilesNotFoundError", "EmptyDatasetError"} & {cls.__name__ for cls in type(error).__mro__}
    if missing or (isinstance(error, FileNotFoundError) and "Unable to find" in text):
        return NotFoundError("no data files are found", where=place, mend="check `data_files` and the folder's layout")
    return None


def _hub_error(place: Place, error: Exception, text: str) -> ClbenchError | None:
    """Return the error for what the hub refuses."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in kinds or "gated dataset" in text:
        mend = "ask for access on its page, log in (`hf auth login`), and run again"
        return NotFoundError(f"{place.dataset} is kept for those who asked for access", mend=mend)
    if "RevisionNotFoundError" in kinds:
        mend = "give a commit of 40 digits from the data set's history"
        return NotFoundError(f"there is no revision {place.revision!r}", where=place.dataset, mend=mend)
    if {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"} & kinds:
        mend = "check the id (OWNER/NAME), or log in if it is private (`hf auth login`)"
        return NotFoundError(f"the hub has no data set {place.dataset!r}", mend=mend)
    if "HfHubHTTPError" in kinds:
        mend = "try again later, or check HF_ENDPOINT"
        return OfflineError(f"the model hub refuses: {_short(text)}", where=place.dataset, mend=mend)
    return None


def _is_network_error(error: BaseException | None) -> bool:
    """Tell whether an exception, or what caused it, is the network's."""
    while error is not None:
        libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or libraries & NETWORK_LIBRARIES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"
