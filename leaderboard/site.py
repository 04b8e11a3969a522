"""The leaderboard: one folder of static pages that opens from a disk or any web server.

    index.html                      the board (or, with several tracks, a list of them and a folder per track)
    methods/<method>.html           one page per method
    data/table.csv  data/data.json  the board's figures
    data/<method>/                  matrices as CSV, scores as JSON, and the raw files of every seed

Pages are a pure function of the runs: the same runs give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench import __version__
from clbench.errors import ConfigError, IntegrityError
from clbench.files import atomic_folder, write_text
from clbench.leaderboard import capacity_parts, charts, figures, view
from clbench.leaderboard.page import csv_text, json_text, render, slug
from clbench.leaderboard.submission import Submissions, VerifiedEntry, finder, read_submissions, require_folder
from clbench.leaderboard.view import UNIT_NAMES, UNITS, MethodView
from clbench.results.capacity import MAIN as MAIN_FIGURES
from clbench.results.capacity import PER_RUN
from clbench.results.metrics import MAIN
from clbench.results.store import RunStore

Source = RunStore | VerifiedEntry
Links = list[tuple[str, str]]
"""Names and addresses."""
MARK = ".clbench-site"
"""Empty file that says: this folder was made here and may be replaced."""
VERDICTS = 5
"""Sentences on the board."""


@dataclass(frozen=True)
class Site:
    """What was built."""

    index: Path
    """The first page."""
    rejected: list[str]
    """Entries that failed verification and are not shown, one line per problem."""


def submissions_folder() -> Path:
    """Return the folder of the entries that come with this checkout; a wheel has none."""
    return Path(__file__).parent / "submissions"


def build_site(
    sources: Iterable[Source], out: Path, *, submissions: Path | None = None, tracks: Sequence[Any] = ()
) -> Site:
    """Write the pages of runs and verified entries.

    The folder appears whole or not at all; an earlier site is replaced, any other folder with files refused.

    Args:
        sources: run folders (shown as reported) and entries from ``read_submissions`` (shown as checked).
        out: the folder to write.
        submissions: a folder of entries to verify and show besides; None takes ``submissions_folder`` when there are
            no ``sources``, and otherwise nothing.
        tracks: of the submissions, ``clbench.track.Track``s that do not come with clbench.

    Raises:
        ConfigError: nothing to show, or ``out`` holds something else.
    """
    given = list(sources)
    if submissions is None and given:
        entries = Submissions([], {})
    else:
        folder = require_folder(submissions) if submissions else submissions_folder()
        entries = read_submissions(folder, find=finder(tracks))
    found = by_track([*given, *entries.accepted])
    if not found:
        refused = next((f"{name}: {lines[0]}" for name, lines in entries.rejected.items()), None)
        raise ConfigError(
            "there are no runs to show"
            + (f"; {len(entries.rejected)} entries were refused, {refused}" if refused else ""),
            mend="see `clbench leaderboard verify`" if refused else "run `clbench run`, or give folders that hold runs",
        )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
        raise ConfigError("this folder holds something else than a site", where=out, mend="choose another folder")
    with atomic_folder(out) as folder:
        (folder / MARK).touch()
        alone = len(found) == 1
        cards = []
        for name, members in found.items():
            views = view.method_views(members)
            home = folder if alone else folder / slug(name)
            write_track(views, home, home_link="../index.html" if not alone else "index.html")
            cards.append(
                {
                    "name": views[0].summary.track["name"],
                    "description": views[0].summary.track.get("description") or "",
                    "href": f"{slug(name)}/index.html",
                    "facts": view.facts(views),
                    "n_methods": len(views),
                }
            )
        if not alone:
            write_text(folder / "index.html", page("home.html.j2", home=None, tracks=cards))
    rejected = [f"{name}: {line}" for name, lines in entries.rejected.items() for line in lines]
    return Site(out / "index.html", rejected)


def by_track(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """Return the sources by track; two tracks of one name are told apart by their digests.

    Runs without any measured row are left out.
    """
    found: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        run = source if isinstance(source, RunStore) else source.runs[0]
        if not run.stages_done():
            continue
        try:
            track = run.config()["track"]
            key = (str(track["name"]), str(track["sha256"]))
        except (KeyError, TypeError):
            raise IntegrityError("run.yaml names no track", where=run.folder, mend="restore it or run again") from None
        found.setdefault(key, []).append(source)
    names = [name for name, _ in found]
    return {
        (f"{name}-{digest[:8]}" if names.count(name) > 1 else name): members
        for (name, digest), members in sorted(found.items())
    }


def page(template: str, **context: Any) -> str:
    """Return a page with what every template needs."""
    return render(
        template,
        **{"version": __version__, "unit_names": UNIT_NAMES, "marker": charts.legend_marker, **context},
    )


def write_track(views: Sequence[MethodView], folder: Path, home_link: str) -> None:
    """Write the board, the method pages and the downloads of one track."""
    rows = view.board_rows(views, "")
    data = board_data(views, rows)
    write_text(folder / "index.html", board_page(views, rows, data, home_link))
    write_text(folder / "data" / "data.json", json_text(data))
    write_text(folder / "data" / "table.csv", csv_text(*board_table(views, rows)))
    for one in views:
        target, prefix = folder / "data" / one.slug, f"../data/{one.slug}/"
        downloads, raw = write_figures(one, target, prefix), copy_raw(one, target, prefix)
        write_text(folder / "methods" / f"{one.slug}.html", method_page(one, views, downloads, raw))


def board_page(views: Sequence[MethodView], rows: list[dict[str, Any]], data: Any, home_link: str) -> str:
    """Return the board."""
    track = dict(views[0].summary.track)
    track.setdefault("description", "")
    track.setdefault("oracle", None)
    return page(
        "board.html.j2",
        home=home_link,
        prefix="data/",
        track=track,
        facts=view.facts(views),
        verdict=view.verdict(views)[:VERDICTS],
        caveat=view.caveat(views),
        rows=rows,
        views=views,
        families=sorted({one.family for one in views}),
        main=view.columns_of(MAIN, track),
        primary_title=view.score_title(view.PRIMARY, track),
        tradeoff={short: figures.trade_off(views, short, "") for short in UNITS},
        periods={short: figures.methods_by_period(views, short, "board") for short in UNITS},
        max_lines=figures.MAX_LINES,
        differences=view.difference_rows(views) if len(views) > 1 else [],
        capacity=capacity_parts.overview(views),
        difference_columns=view.columns_of(view.DIFFERENCES, track),
        reference=view.reference_of(views),
        unfinished=view.unfinished_lines(views),
        data=data,
    )


def method_parts(one: MethodView, name: str) -> dict[str, Any]:
    """Return what a method's page and its section of a report show alike."""
    config = one.configs[0]
    return {
        "view": one,
        "matrices": view.matrix_views(one),
        "curves": {short: figures.period_curves(one, short, name) for short in UNITS},
        "training": figures.training_loss(one, name),
        "bill": view.bill_view(one),
        "scores": view.score_rows(one),
        "commands": sorted(one.summary.commands.items()),
        "configuration": view.pairs({key: config.get(key) for key in ("method", "training", "base", "run_id")}),
        "environment": view.pairs(config.get("environment") or {}),
    }


def method_page(one: MethodView, views: Sequence[MethodView], downloads: Links, raw: list[tuple[int, Links]]) -> str:
    """Return the page of one method."""
    track = {"description": "", "oracle": None, **one.summary.track}
    sentences = [s for s in view.verdict(views) if s.label == one.label]
    return page(
        "method.html.j2",
        home="../index.html",
        track=track,
        facts=view.facts([one]),
        verdict=sentences,
        caveat=view.caveat([one]),
        stages=view.stage_heads(one.summary),
        unfinished=view.unfinished_lines([one]),
        capacity=capacity_parts.overview([one]),
        course=capacity_parts.course([one.capacity]),
        downloads=downloads,
        raw=raw,
        **method_parts(one, "method"),
    )


def board_data(views: Sequence[MethodView], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the board's figures for programs: scores in both units, bills, ranks, matrices."""
    return {
        "format": 1,
        "track": {k: v for k, v in views[0].summary.track.items() if k != "row0"},
        "methods": [
            {
                "label": one.label,
                "status": one.status,
                "date": one.date,
                "page": f"methods/{one.slug}.html",
                "rank": {UNITS[short]: row["rank"][short]["text"] for short in UNITS},
                "n_seeds": row["n_seeds"],
                "bill": one.summary.bill.as_dict() if row["bill"] else None,
                "scores": {
                    UNITS[short]: {name: score.as_dict() for name, score in summary.scores.items()}
                    for short, summary in one.summaries.items()
                },
                "matrices": {unit: matrix.as_dict() for unit, matrix in one.summary.matrices.items()},
                "capacity": one.capacity.summary_dict(),
            }
            for one, row in zip(views, rows, strict=True)
        ],
    }


def board_table(views: Sequence[MethodView], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the board as one CSV table, losses in both units."""
    header = ["rank", "method", "family", "n_seeds"]
    for short, unit in UNITS.items():
        for name in MAIN:
            if short == "nats" or views[0].summary.scores[name].unit != "ratio":
                header += [f"{name}_{unit}{end}" for end in ("", "_low", "_high")]
    header += [f"{key}{end}" for key in (*PER_RUN, *MAIN_FIGURES) for end in ("", "_low", "_high")]
    header += ["n_tokens", "flops", "seconds", "peak_memory_bytes", "stored_bytes", "status", "date"]
    table = []
    for one, row in zip(views, rows, strict=True):
        line: list[Any] = [row["rank"]["nats"]["text"], one.label, one.family, row["n_seeds"]]
        for short, summary in one.summaries.items():
            for name in MAIN:
                score = summary.scores[name]
                if short == "nats" or score.unit != "ratio":
                    line += [score.value, score.low, score.high]
        capacity = one.capacity
        for key in PER_RUN:
            value = capacity.estimate.per_run[key]
            line += [value.value, value.low, value.high]
        for key in MAIN_FIGURES:
            value = capacity.figure(key, capacity.last)
            line += [value.value, value.low, value.high]
        bill = one.summary.bill
        costs = [
            bill.n_tokens,
            bill.total_flops,
            bill.total_seconds,
            bill.peak_memory_bytes,
            bill.total_stored_bytes,
        ]
        table.append([*line, *costs, one.status, one.date])
    return header, table


def write_figures(one: MethodView, folder: Path, prefix: str) -> Links:
    """Write matrices and scores of one method; return names and links."""
    names = []
    for short, unit in UNITS.items():
        write_text(folder / f"matrix-{unit}.csv", csv_text(*view.matrix_csv(one, short)))
        names.append(f"matrix-{unit}.csv")
    write_text(folder / "summary.json", json_text({UNITS[s]: m.as_dict() for s, m in one.summaries.items()}))
    write_text(folder / "capacity.json", json_text(one.capacity.as_dict()))
    return [(name, prefix + name) for name in (*names, "summary.json", "capacity.json")]


def copy_raw(one: MethodView, folder: Path, prefix: str) -> list[tuple[int, Links]]:
    """Copy the raw files of every seed; return names and links by seed."""
    found = []
    for run, config in zip(one.runs, one.configs, strict=True):
        seed = int(config["seed"])
        target = folder / f"seed-{seed}"
        target.mkdir(parents=True, exist_ok=True)
        files = [run.folder / name for name in ("run.yaml", "ledger.json", "steps.jsonl")]
        files += sorted((run.folder / "rows").glob("*.parquet"))
        links = []
        for file in (f for f in files if f.is_file()):
            shutil.copyfile(file, target / file.name)
            links.append((file.name, f"{prefix}seed-{seed}/{file.name}"))
        found.append((seed, links))
    return found
