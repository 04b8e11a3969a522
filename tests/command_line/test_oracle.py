"""The oracle: token-matched, equal shares, frozen into the track file without touching the rest, used as normaliser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from clbench import registry
from clbench.base import make_base, open_stream
from clbench.files import read_json
from clbench.home import bases_folder
from clbench.oracle import with_frozen
from clbench.results.matrix import matrix_of
from clbench.results.store import RunStore
from clbench.run import hardware_for
from clbench.train import loop
from tests.command_line.driver import clbench, write_track

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
N_TOKENS = 3000 + 3 * 1500


@pytest.fixture(scope="module")
def frozen(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A track whose oracle was trained for two seeds and written into its file."""
    path = write_track(tmp_path_factory.mktemp("oracle") / "tiny-oracle.yaml", name="tiny-oracle")
    path.write_text("# kept: a comment\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert clbench("prepare", path).code == 0
    made = clbench("oracle", path, "--seed", 0, "--seed", 1, "--write")
    assert made.code == 0, made.err
    assert "nats_per_token" in made.out
    return path


def test_it_is_frozen_into_the_file_and_changes_nothing_else(frozen: Path) -> None:
    text = frozen.read_text(encoding="utf-8")
    track = registry.load_track(str(frozen))
    before = registry.load_track(str(write_track(frozen.parent / "before.yaml", name="tiny-oracle")))
    assert text.startswith("# kept: a comment\n")
    assert track.oracle is not None
    assert track.row0 is not None
    assert track.oracle.seeds == [0, 1]
    assert track.stream_sha256 == open_stream(track).sha256
    assert track.model_copy(update={"oracle": None, "row0": None, "stream_sha256": None}) == before
    assert track.base_sha256() == before.base_sha256()  # freezing must not make a new base


def test_it_is_token_matched_with_equal_shares_over_all_stages(frozen: Path) -> None:
    track = registry.load_track(str(frozen))
    assert track.oracle is not None
    assert track.oracle.n_tokens == N_TOKENS
    records = [read_json(path) for path in bases_folder().glob("tiny-oracle-oracle-*/oracle.json")]
    assert sorted(record["seed"] for record in records) == [0, 1]
    for record in records:
        shares = record["ledger"]["tokens"]["3"]
        assert sum(shares.values()) == N_TOKENS
        assert set(shares) == {"0", "1", "2", "3"}
        assert max(shares.values()) - min(shares.values()) <= 1


def test_row_0_is_what_a_run_measures_and_regret_is_against_the_oracle(frozen: Path, tmp_path: Path) -> None:
    track = registry.load_track(str(frozen))
    assert track.oracle is not None
    assert track.row0 is not None
    done = clbench("run", "-t", frozen, "-m", "sequential", "--out", tmp_path, "--mlflow", "none", "--json")
    assert done.code == 0, done.err
    assert "row 0" not in done.err  # within tolerance: no warning
    values = matrix_of(RunStore.open(tmp_path / "tiny-oracle/sequential/seed-0")).values
    assert values[0] == pytest.approx(track.row0.nats_per_token, abs=1e-5)
    below = np.tril_indices(4, -1)
    expected = (values - np.array(track.oracle.nats_per_token))[below].mean()
    assert json.loads(done.out)[0]["scores"]["backward"]["value"] == pytest.approx(expected, abs=1e-9)


def test_asking_again_trains_nothing(frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(job: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "train", never)
    monkeypatch.setattr("clbench.base.train", never)
    again = clbench("oracle", frozen, "--seed", 0, "--seed", 1, "--json")
    assert again.code == 0, again.err
    track = registry.load_track(str(frozen))
    assert track.oracle is not None
    assert json.loads(again.out)["oracle"]["nats_per_token"] == track.oracle.nats_per_token


def test_a_base_outside_the_tolerance_is_said(frozen: Path, tmp_path: Path) -> None:
    track = yaml.safe_load(frozen.read_text(encoding="utf-8"))
    track["row0"]["nats_per_token"][1] += 0.2
    path = tmp_path / "moved.yaml"
    path.write_text(yaml.safe_dump(track), encoding="utf-8")
    done = clbench("run", "-t", path, "-m", "frozen", "--out", tmp_path, "--mlflow", "none")
    assert done.code == 0
    assert "0.200 nats per token from the track's row 0" in " ".join(done.err.split())


def test_frozen_blocks_are_replaced_wherever_they_stand() -> None:
    text = "name: a\noracle:\n  seeds: [0]\n  # old\n# a comment\nstream: s\nstream_sha256: x\n"
    assert with_frozen(text, {"stream_sha256": "y", "oracle": {"seeds": [1]}}) == (
        "name: a\n# a comment\nstream: s\nstream_sha256: y\noracle:\n  seeds: [1]\n"
    )


def test_bases_are_shared_by_tracks_that_make_them_alike(frozen: Path) -> None:
    track = registry.load_track(str(frozen))
    stream = open_stream(track)
    base = make_base(track, stream, hardware_for(track, stream, "cpu"))
    assert base.facts["ledger"]["tokens"] == {"0": {"0": 3000}}
