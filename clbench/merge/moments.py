"""Adam's second moments: where they lie, what they look like compressed, and what is refused.

They are what ``graft`` and ``ota`` weigh changes by. ``clbench run --moments full|rank1`` writes them beside every
release; a run's resume states have those of its last stages. A file holds ``exp_avg_sq/NAME`` by the names of the
weights, or a matrix's row and column sums (``exp_avg_sq_row/NAME``, ``exp_avg_sq_column/NAME``), m + n numbers for m n.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clbench.errors import ConfigError, NotFoundError
from clbench.files import atomic_path
from clbench.merge.execute import MOMENT, ROW, compress_moments
from clbench.merge.tensors import FileSource, TensorSource, open_source
from clbench.method import Weights

Form = Literal["full", "rank1"]
FORMS: tuple[Form, ...] = ("full", "rank1")
FILE = "moments.safetensors"


def of_optimizer(tensors: Weights, form: Form) -> Weights:
    """Return the second moments among an optimizer's tensors (``key/NAME``), without what else it keeps.

    Raises:
        ConfigError: it keeps none: SGD, Lion and the like, or Adafactor, whose factors have other names.
    """
    found = {key: tensor for key, tensor in tensors.items() if key.startswith(MOMENT)}
    if not found:
        kinds = sorted({key.partition("/")[0] for key in tensors})
        kept = f"its state has {', '.join(kinds)}" if kinds else "its state is empty"
        raise ConfigError(
            f"this optimizer keeps no second moments: {kept}", mend="train with AdamW, or take no moments"
        )
    return compress_moments(found) if form == "rank1" else found


def write(tensors: Weights, form: Form, path: Path) -> None:
    """Write an optimizer's second moments, whole or not at all."""
    from clbench.train.models import save_file

    moments = of_optimizer(tensors, form)
    with atomic_path(path) as temporary:
        save_file(moments, temporary, metadata={"format": "pt", "form": form})


def find(place: Path, model: Path) -> Path:
    """Return the file with a model's second moments.

    Args:
        place: the file; a folder with ``moments.safetensors``; or a run folder, whose releases or resume states are
            looked through for the stage of the model.
        model: the model's folder, ``RUN/release/stage-K`` where its stage matters.

    Raises:
        NotFoundError: nothing is there.
        ConfigError: there are moments, but not of this stage.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise NotFoundError("moments are missing", where=place, mend="give a file, a release folder or a run")
    if (place / FILE).is_file():
        return place / FILE
    stage = model.resolve().name.removeprefix("stage-")
    if (beside := place / "release" / f"stage-{stage}" / FILE).is_file():
        return beside
    states = sorted(place.glob("checkpoints/*-*-1/optimizer.safetensors"))
    fitting = [one for one in states if stage.isdecimal() and int(one.parent.name.split("-")[0]) == int(stage)]
    if fitting:
        return fitting[-1]
    if states:
        there = ", ".join(sorted({one.parent.name.split("-")[0].lstrip("0") or "0" for one in states}))
        what = f"this run keeps the moments of stage {there}, and {model.name} is another"
        raise ConfigError(what, where=place, mend="run it again with --moments full: then every release has its own")
    mend = "run it with `clbench run --moments full`, or rank1"
    raise NotFoundError("no second moments in there", where=place, mend=mend)


def open_moments(place: Path, model: Path) -> TensorSource:
    """Return the second moments of a model; see ``find``.

    Raises:
        ConfigError: the file has tensors, but no second moments.
    """
    file = find(place, model)
    source = open_source(file, f"moments of {model.resolve().name}")
    if not any(name.startswith((MOMENT, ROW)) for name in source.layout):
        kinds = ", ".join(sorted({name.partition("/")[0] for name in source.layout})) or "nothing"
        raise ConfigError(f"no second moments in it, but {kinds}", where=file, mend="only AdamW's like keep them")
    return source


def files_of(source: TensorSource | None) -> list[Path]:
    """Return the files of a source, none of what is in memory."""
    return source.files if isinstance(source, FileSource) else []
