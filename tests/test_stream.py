from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clbench.errors import IntegrityError, NotFoundError
from clbench.stream import Stream


def test_offsets_cut_the_tokens_into_documents_that_decode_to_their_text_and_one_eos(
    tinydocs: Stream,
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tinydocs.tokenizer_folder / "tokenizer.json"))
    for split in ("train", "heldout"):
        for stage in tinydocs.stages():
            tokens = tinydocs.tokens(split, stage.index)
            offsets = tinydocs.offsets(split, stage.index)
            table = tinydocs.documents(split, stage.index, ["text", "n_tokens"])
            assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(tokens)
            assert np.diff(offsets).tolist() == table["n_tokens"].to_pylist()
            pieces = [tokens[a:b].tolist() for a, b in pairwise(offsets)]
            assert all(piece[-1] == tinydocs.eos_id and tinydocs.eos_id not in piece[:-1] for piece in pieces)
            assert tokenizer.decode_batch([p[:-1] for p in pieces]) == table["text"].to_pylist()


def test_tokens_are_mapped_read_only_in_the_smallest_type(tinydocs: Stream) -> None:
    tokens = tinydocs.tokens("train", 0)
    assert tokens.dtype == np.uint16 and tokens.max() < tinydocs.vocab_size
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


def test_stages_come_back_in_order_with_their_dates(tinydocs: Stream) -> None:
    stages = tinydocs.stages()
    assert [(s.index, s.name) for s in stages] == [(0, "2001"), (1, "2002"), (2, "2003"), (3, "2004")]
    for stage in stages:
        dates = tinydocs.documents("train", stage.index, ["date"])["date"].to_pylist()
        assert stage.start <= min(dates) and max(dates) <= stage.end


def test_later_stages_of_tinydocs_drift_from_the_first(tinydocs: Stream) -> None:
    # The tokenizer knows stage 0 best; text that drifts away needs more tokens per byte.
    rates = [c["n_tokens"] / c["n_bytes"] for c in (tinydocs.counts("train", k) for k in range(4))]
    assert rates == sorted(rates) and rates[1] > 1.3 * rates[0]


def test_the_documents_are_a_hive_partitioned_data_set(tinydocs: Stream) -> None:
    import pyarrow.dataset as ds

    table = ds.dataset(tinydocs.folder / "documents", partitioning="hive").to_table(columns=["split", "stage", "id"])
    assert table.num_rows == sum(tinydocs.counts(s, k)["n_documents"] for s in ("train", "heldout") for k in range(4))


def test_no_manifest_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="run `clbench prepare` first"):
        Stream(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokens/train-01.bin", "documents/split=heldout/stage=02/part-0.parquet", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_harmed_file_is_found_and_the_remedy_named(tinydocs: Stream, tmp_path: Path, name: str, harm: str) -> None:
    folder = shutil.copytree(tinydocs.folder, tmp_path / "copy")
    Stream(folder, check=True)
    path = folder / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match="run `clbench prepare tinydocs`") as error:
        Stream(folder, check=True)
    assert str(path) in str(error.value) and str(folder) in str(error.value)
