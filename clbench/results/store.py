"""The run folder: raw results as files, the source of truth that everything else is computed from.

    run.yaml                  the resolved configuration; running it again gives the same run
    stages/03.json            StageRecord of matrix row 3, written after its rows: its presence means complete
    rows/heldout-03.parquet   rows of suite ``heldout`` under the release weights after stage 3 (00 is the base)
    extras/general-03.json    ExtraRecord of a suite that was named later (clbench.extras), written after its rows
    ledger.json               the bill so far (clbench.train.ledger)
    steps.jsonl               one line per logged optimizer step (StepLine)
    status.json               state: running, done or failed, and why
    release/stage-03/         release weights as a Hugging Face folder
    report.html               page about this run, where MLflow was told of it
    checkpoints/              resume states, see clbench.train.checkpoint

Nothing here imports torch; anyone can read a run with pyarrow and a YAML parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from clbench.errors import IntegrityError, NotFoundError
from clbench.files import atomic_path, explain_os_errors, read_json, write_json, write_text

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The C parser where libyaml is there."""
REQUIRED_CONFIG = {"run_id", "track", "stages", "method", "seed"}
ROWS_SCHEMA = pa.schema(
    [
        ("item", pa.string()),
        ("stage", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        ("group", pa.string()),
        ("change", pa.string()),
    ]
)


class StageRecord(TypedDict):
    """One complete row of the matrix."""

    stage: int
    weights_sha256: str
    """Of the release weights."""
    cells: dict[str, str]
    """Suite name -> cell address."""
    finished: str
    """UTC ISO-8601."""
    n_steps: int
    """Optimizer steps of this stage; 0 for the base and for checkpoints made elsewhere."""
    evaluation: NotRequired[dict[str, float]]
    """``flops`` and ``seconds`` of measuring this row, as billed."""


class ExtraRecord(TypedDict):
    """The rows of one suite that was measured besides the run's own, under the release weights of one stage."""

    suite: str
    spec: str
    """As it was named."""
    stage: int
    weights_sha256: str
    """Of the release weights; the rows count only while the stage has these."""
    cells: dict[str, str]
    """Shard -> cell address, of the shards that could be measured."""
    finished: str
    """UTC ISO-8601."""
    evaluation: dict[str, float]
    """``flops`` and ``seconds``."""


class StepLine(TypedDict):
    """One logged optimizer step."""

    stage: int
    step: int
    loss_nats: float
    """Mean over the target tokens of the batch, without penalties."""
    lr: float
    grad_norm: float
    """Before clipping."""
    n_tokens: int
    """Target tokens of the stage so far."""
    tokens_per_second: float
    memory_bytes: int
    cpu_percent: float
    time: str
    """UTC ISO-8601."""


@dataclass(frozen=True)
class RunStore:
    """Reads and writes one run folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> RunStore:
        """Return the store of an existing run."""
        if not (folder / "run.yaml").is_file():
            raise NotFoundError(
                "not a run folder: run.yaml is missing", where=folder, mend="give the folder of one seed"
            )
        return cls(folder)

    # configuration and status

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration (the fields of ``clbench.track.RunConfig``)."""
        try:
            config = read_yaml((self.folder / "run.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFoundError("run.yaml is missing", where=self.folder) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise IntegrityError(f"run.yaml is broken: {error}", where=self.folder) from None
        if not isinstance(config, dict):
            raise IntegrityError("run.yaml is not a mapping", where=self.folder)
        if missing := sorted(REQUIRED_CONFIG - config.keys()):
            raise IntegrityError(f"run.yaml lacks {', '.join(missing)}", where=self.folder)
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration, once."""
        write_text(self.folder / "run.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def status(self) -> dict[str, Any]:
        """Return ``{"state": "running" | "done" | "failed" | "absent", ...}``."""
        path = self.folder / "status.json"
        status: dict[str, Any] = read_json(path) if path.is_file() else {"state": "absent"}
        return status

    def write_status(self, state: str, **details: Any) -> None:
        """Replace the status."""
        write_json(self.folder / "status.json", {"state": state, **details})

    # matrix rows

    def stages_done(self) -> list[int]:
        """Return the stages whose matrix row is complete, ascending."""
        return sorted(int(path.stem) for path in (self.folder / "stages").glob("*.json") if path.stem.isdigit())

    def stage_record(self, stage: int) -> StageRecord:
        """Return the record of one complete row."""
        record: StageRecord = read_json(self.folder / "stages" / f"{stage:02d}.json")
        return record

    def write_stage_record(self, record: StageRecord) -> None:
        """Declare a row complete; write its rows first."""
        write_json(self.folder / "stages" / f"{record['stage']:02d}.json", dict(record))

    # suites that were measured besides

    def extra_record(self, suite: str, stage: int) -> ExtraRecord | None:
        """Return the record of a suite that was named later, None where there is none of these weights."""
        path = self.folder / "extras" / f"{suite}-{stage:02d}.json"
        if not path.is_file() or stage not in self.stages_done():
            return None
        record: ExtraRecord = read_json(path)
        same = record.get("weights_sha256") == self.stage_record(stage)["weights_sha256"]
        return record if same else None

    def write_extra_record(self, record: ExtraRecord) -> None:
        """Declare the rows of a further suite complete; write them first."""
        write_json(self.folder / "extras" / f"{record['suite']}-{record['stage']:02d}.json", dict(record))

    def suites(self) -> dict[str, list[int]]:
        """Return the stages that each suite was measured on, the run's own suites first."""
        found: dict[str, list[int]] = {}
        done = self.stages_done()
        for stage in done:
            for suite in self.stage_record(stage)["cells"]:
                found.setdefault(suite, []).append(stage)
        for name in sorted({path.stem.rpartition("-")[0] for path in (self.folder / "extras").glob("*.json")}):
            stages = [stage for stage in done if self.extra_record(name, stage) is not None]
            if stages and name not in found:
                found[name] = stages
        return found

    def rows(self, suite: str, stage: int) -> pa.Table:
        """Return the rows of one suite under the release weights after ``stage``, schema ROWS_SCHEMA."""
        return read_rows(self.folder / "rows" / f"{suite}-{stage:02d}.parquet")

    def write_rows(self, suite: str, stage: int, rows: pa.Table) -> None:
        """Write the rows of one suite of one stage."""
        write_rows(self.folder / "rows" / f"{suite}-{stage:02d}.parquet", rows)

    # bill and training log

    def ledger(self) -> dict[str, Any]:
        """Return the bill (``clbench.train.ledger.Ledger.as_dict``), empty for checkpoints made elsewhere."""
        path = self.folder / "ledger.json"
        ledger: dict[str, Any] = read_json(path) if path.is_file() else {}
        return ledger

    def write_ledger(self, ledger: Mapping[str, Any]) -> None:
        """Replace the bill."""
        write_json(self.folder / "ledger.json", dict(ledger))

    def steps(self) -> list[StepLine]:
        """Return the training log; a last line that a kill cut in half is dropped."""
        path = self.folder / "steps.jsonl"
        if not path.is_file():
            return []
        lines: list[StepLine] = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def append_steps(self, lines: Iterable[StepLine]) -> None:
        """Append to the training log."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "steps.jsonl"
        with explain_os_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(text)

    def forget_steps_from(self, stage: int, step: int) -> None:
        """Drop the log lines at and after (stage, step): a resumed run writes them again."""
        if not (self.folder / "steps.jsonl").is_file():
            return
        kept = [line for line in self.steps() if (line["stage"], line["step"]) < (stage, step)]
        write_text(self.folder / "steps.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def utc_now() -> str:
    """Return the time, UTC ISO-8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_yaml(text: str) -> Any:
    """Return the value of one YAML document; plain values only, as with ``yaml.safe_load``, at ten times its speed."""
    loader = SAFE_LOADER(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_rows(path: Path) -> pa.Table:
    """Read measured rows; a missing or broken file is a ClbenchError."""
    if not path.is_file():
        raise NotFoundError("rows are missing", where=path, mend="run `clbench run` again: it measures what is missing")
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        return table.select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise IntegrityError(
            f"rows cannot be read: {error}", where=path, mend="delete the file and run again"
        ) from None


def write_rows(path: Path, rows: pa.Table) -> None:
    """Write rows atomically, the same bytes for the same rows."""
    with atomic_path(path) as temporary:
        pq.write_table(
            rows.select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA),
            temporary,
            compression="zstd",
            write_page_checksum=True,
        )


def find_runs(folders: Iterable[Path]) -> list[RunStore]:
    """Return the runs at or below the given folders, in path order; MLflow's copies beside them are none."""
    found: dict[Path, RunStore] = {}
    for folder in folders:
        if not folder.exists():
            raise NotFoundError("folder is missing", where=folder)
        for path in sorted(folder.rglob("run.yaml")):
            parts = path.relative_to(folder).parts
            if not any(part.startswith(".") for part in parts) and not _is_mlflow_copy(path):
                found.setdefault(path.parent.resolve(), RunStore(path.parent))
    return list(found.values())


def _is_mlflow_copy(path: Path) -> bool:
    """Return whether a file is ``DATABASE-artifacts/RUN/artifacts/FILE``, which MLflow keeps (``clbench.tracking``)."""
    return path.parent.name == "artifacts" and path.parents[2].name.endswith("-artifacts")
