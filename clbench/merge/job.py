"""What ``clbench merge`` does, from two folders and two texts to a chosen model, its report and its bill.

Checks come first, then scores, then the search; the model, its plan, ``points.json`` and ``report.html`` appear
together or not at all. How points are searched stands in ``search``, what they are in ``families``.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clbench.errors import ConfigError, NotFoundError
from clbench.files import atomic_folder, digest_of, read_json, sha256_file, write_json, write_text
from clbench.home import home
from clbench.merge import learn, moments, search
from clbench.merge.evaluate import (
    SIDES,
    Bench,
    JointJudge,
    Judge,
    LossJudge,
    Side,
    SuiteJudge,
    Text,
    draw,
    load_tokenizer,
    read_text,
)
from clbench.merge.execute import Sources, merge_folder, remove_stale
from clbench.merge.families import DENSITY, METHODS, SEVERAL, SOUPS, TUNED, Family, Learned, Restoring, Spot
from clbench.merge.families import Path as PathFamily
from clbench.merge.front import Point, cost_reduction, front
from clbench.merge.outcome import Standing, Yardstick
from clbench.merge.plan import to_mergekit_yaml
from clbench.merge.scores import Granularity, Scorer, Spectra, TensorScore, flops_of, natural
from clbench.merge.select import CHOICES, freeze_list, order_units, write_freeze_list
from clbench.merge.soups import Soup
from clbench.merge.tensors import (
    TensorSource,
    check_compatible,
    layout_sha256,
    open_source,
    tensor_sha256,
    tokenizer_sha256,
)
from clbench.results.metrics import Value
from clbench.train.parallel import find_device

if TYPE_CHECKING:
    from clbench.merge.impact import Impact
    from clbench.merge.search import Desk, Measured

MAX_WINDOW = 1024
"""Tokens in a window of the evaluation, at most."""
FORMAT = 1
ALIKE = {"task-arithmetic": "wise-ft", "ties": "trim", "model-stock": "wise-ft"}
"""Methods of several experts -> what is left of them with one."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is wanted; paths are as the user gave them."""

    base: Path
    tuned: Path
    method: str = "spear-mm"
    domain: str | None = None
    general: str | None = None
    keep: float = 0.95
    out: Path | None = None
    q: float | None = None
    s: float | None = None
    n_evaluations: int = 16
    n_tokens: int = 20_000
    text_column: str = "text"
    controls: bool = False
    impact: bool = False
    choose: str = "spear"
    granularity: Granularity = "layer"
    strengths: tuple[float, ...] = search.STRENGTHS
    interp: str = "slerp"
    embeddings: bool = False
    experts: tuple[Path, ...] = ()
    """Other models that started from the base; of soups the older checkpoints."""
    density: float = DENSITY
    """Of ``ties``."""
    moments: tuple[Path, ...] = ()
    """Adam's second moments of tuned and each expert: files, or what ``moments.find`` looks into."""
    suites: tuple[str, ...] = ()
    """Suites of questions, which are benchmarks of the general side."""
    soup_base: bool = True
    power: float = 4.0
    """Of ``mwa``."""
    mix: float = learn.MIX
    """Share of general text in what shares are learnt on."""
    n_learn_tokens: int = 8_192
    n_learn_steps: int = learn.N_STEPS
    ledger: Path | None = None
    seed: int = 0
    device: str = "auto"
    mergekit: Path | None = None
    freeze: Path | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether one point is asked for, and no search."""
        return self.s is not None or self.method in SOUPS

    @property
    def has_texts(self) -> bool:
        """Whether anything can be measured."""
        return self.domain is not None

    def check(self) -> None:
        """Refuse what does not hold together, before a file is read.

        Raises:
            ConfigError: what, and how to mend it.
        """
        if self.method not in METHODS:
            raise ConfigError(f"there is no method {self.method!r}", mend=f"give {', '.join(METHODS)}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"--keep {self.keep:g} is no share", mend="give more than 0 and at most 1, such as 0.95")
        self._check_point()
        self._check_several()
        if (self.domain is None) != (self.general is None):
            raise ConfigError("one text is not enough", mend="give both --domain and --general")
        if not (self.has_texts or self.is_fixed):
            raise ConfigError("a search needs text to measure on", mend="give --domain and --general, or a fixed -s")
        if (self.controls or self.impact) and not self.has_texts:
            raise ConfigError("controls are measured", mend="give --domain and --general")
        if self.suites and not self.has_texts:
            raise ConfigError("suites are measured beside texts", mend="give --domain and --general")
        if self.method in ("learned-alpha", "greedy-soup", "mwa") and not self.has_texts:
            raise ConfigError(f"{self.method} reads text", mend="give --domain and --general")
        if self.out is not None and (self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))):
            raise ConfigError("there is something already", where=self.out, mend="choose another --out")
        self._check_method()

    def _check_point(self) -> None:
        if (self.q is not None and self.s is None) or (self.s is not None and self._has_units and self.q is None):
            raise ConfigError("a fixed point of spear-mm is -q and -s", mend="give both")
        if self.q is not None and not self._has_units:
            raise ConfigError(f"{self.method} has no q", mend="give -s alone")
        for name, value in (("-q", self.q), ("-s", self.s), *(("--strength", one) for one in self.strengths)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} {value:g} is no share", mend="give a number from 0 to 1")

    @property
    def _has_units(self) -> bool:
        return self.method == "spear-mm"

    def _check_method(self) -> None:
        if self.choose not in CHOICES:
            raise ConfigError(f"order {self.choose!r} is unknown", mend=f"give {', '.join(CHOICES)}")
        if self.granularity not in ("layer", "module", "tensor") or self.interp not in ("slerp", "lerp"):
            raise ConfigError("granularity is layer, module or tensor, interp slerp or lerp", mend="choose one of them")
        if not self._has_units and (self.freeze or self.impact):
            raise ConfigError("freeze lists and impacts are of spear-mm's units", mend="give --method spear-mm")
        if self.mergekit and self.method in ("dg-hard", "graft", "dare", "ota", "intruders", *SOUPS):
            raise ConfigError(f"mergekit has no {self.method} like ours", mend="leave out --export-mergekit")
        if self.mergekit and self.method == "model-stock" and self.s != 0:
            raise ConfigError("mergekit's model stock has no strength", mend="give -s 0")

    def _check_several(self) -> None:
        """Refuse other models where the method has no use for them, and moments that do not fit their number."""
        if self.experts and self.method not in (*SEVERAL, "learned-alpha", *SOUPS):
            mend = f"give --method {', '.join(SEVERAL)} or learned-alpha"
            raise ConfigError(f"{self.method} has one tuned model", mend=mend)
        if not self.experts and self.method in ALIKE:
            mend = f"give --expert MODEL, or --method {ALIKE[self.method]}"
            raise ConfigError(f"{self.method} merges several tuned models", mend=mend)
        if not 0 < self.density <= 1:
            raise ConfigError(f"--density {self.density:g} is no share", mend="give more than 0 and at most 1")
        n_wanted = {"graft": 1, "ota": 1 + len(self.experts)}.get(self.method, 0)
        if len(self.moments) != n_wanted:
            n = f"{len(self.moments)} --moments" if self.moments else "no --moments"
            mend = "give --moments RUN of the tuned model and of every expert" if n_wanted else "leave them out"
            raise ConfigError(f"{self.method} needs Adam's second moments of {n_wanted} models, and has {n}", mend=mend)
        if self.method in SOUPS and self.s is not None:
            raise ConfigError(f"{self.method} has no strength", mend="leave -s out")
        if not 0 < self.mix < 1 or self.n_learn_steps < 1 or self.n_learn_tokens < 1:
            raise ConfigError("learning needs a --mix between 0 and 1, steps and tokens", mend="mend them")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ConfigError(f"--power {self.power} is out of range", mend="give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What training the tuned model cost."""

    flops: float
    seconds: float
    n_tokens: int


@dataclass(kw_only=True)
class Result:
    """What was found."""

    options: Options
    sources: Sources
    weights: dict[str, str]
    """Digests of base and tuned."""
    family: Family
    chosen: Spot | None = None
    why: str = ""
    """One line: what was chosen, or why nothing was."""
    scores: list[TensorScore]
    scores_bill: dict[str, float]
    texts: dict[str, Text]
    suites: list[SuiteJudge] = field(default_factory=list)
    learning: dict[str, Any] = field(default_factory=dict)
    """What learning shares cost and how its loss fell; empty for other methods."""
    yardstick: Yardstick | None = None
    desk: Desk | None = None
    walked: list[Measured] = field(default_factory=list)
    controls: list[tuple[Spot, Measured]] = field(default_factory=list)
    impacts: list[Impact] = field(default_factory=list)
    agreements: dict[str, Value] = field(default_factory=dict)
    exhausted: bool = False
    retraining: Retraining | None = None
    standings: dict[str, Standing] = field(default_factory=dict)
    """Digest of the plan -> where it stands."""
    _bench: Bench | None = None

    def bench(self, tokenizer: Any) -> Bench:
        """Return the model that takes the weights of all candidates, loaded once."""
        if self._bench is None:
            self._bench = Bench(self.sources, find_device(self.options.device), tokenizer)
        return self._bench

    def let_go(self) -> None:
        """Give the memory of that model back; it is loaded again when something has to be measured."""
        self._bench = None

    def points(self) -> list[dict[str, Any]]:
        """Return base, tuned and all points of the walk, then the controls, as JSON-able values."""
        found = [self._point(one.spot, one) for one in self._ends()]
        found += [self._point(one.spot, one) for one in self.walked if one.role == "walk"]
        found += [{**self._point(spot, one), "role": "control"} for spot, one in self.controls]
        walked = [p for p in found if p["role"] != "control"]
        sound = [p for p in walked if p["standing"]["domain"]["value"] is not None]
        best = {p.what for p in front([_place(point) for point in sound])}
        for point in found:
            point["front"] = point["role"] != "control" and point["plan_sha256"] in best
            chosen = self.chosen is not None and point["plan_sha256"] == self.chosen.plan.sha256
            point["chosen"] = chosen and point["role"] != "control"
        return found

    def _ends(self) -> list[Measured]:
        return [one for one in self.desk.found.values() if one.role == "end"] if self.desk else []

    def _point(self, spot: Spot, one: Measured) -> dict[str, Any]:
        spent = self._spent(one)
        reduction = {
            unit: _number(cost_reduction(spent[unit], getattr(self.retraining, unit)).value)
            if self.retraining
            else None
            for unit in ("flops", "seconds")
        }
        return {
            "label": spot.label,
            "role": one.role,
            **{key: value for key, value in spot.about.items() if key in ("q", "s")},
            "plan_sha256": spot.plan.sha256,
            "standing": self.standings[spot.plan.sha256].as_dict(),
            "cost": spent,
            "cost_reduction": reduction,
        }

    def _spent(self, one: Measured) -> dict[str, float]:
        """Return the cost of a point: its own, and an equal share of the scores and of learning."""
        n = max(1, len(self.walked))
        return {unit: math.fsum(getattr(one, unit).values()) + self._before(unit) / n for unit in ("flops", "seconds")}

    def _before(self, unit: str) -> float:
        return self.scores_bill[unit] + float(self.learning.get(unit, 0.0))

    def bill(self) -> dict[str, Any]:
        """Return the cost of scores, search and controls, beside that of retraining."""
        groups = {"search": ("end", "walk"), "controls": ("control",), "impact": ("impact",)}
        found: dict[str, Any] = {"scores": self.scores_bill}
        found |= {"learning": self.learning} if self.learning else {}
        found |= {name: self.desk.bill(roles) for name, roles in groups.items()} if self.desk else {}  # type: ignore[arg-type]
        whole = {}
        for unit in ("flops", "seconds"):
            whole[unit] = self._before(unit) + math.fsum(found["search"][unit].values()) if self.desk else 0.0
        found["search_total"] = whole
        found["measured_now"] = self.desk.n_fresh if self.desk else 0
        if self.retraining is not None and self.walked:
            found["retraining"] = vars(self.retraining)
            n = len([one for one in self.walked if one.role == "walk"])
            found["n_points"] = n
            for unit in ("flops", "seconds"):
                per_point = cost_reduction(whole[unit], n * getattr(self.retraining, unit))
                found[f"cost_reduction_{unit}"] = _number(per_point.value)
        return found

    def layers(self) -> list[dict[str, Any]]:
        """Return every unit with its score, its strength and what restoring it alone does."""
        if isinstance(self.family, Learned):
            return self._learnt_layers(self.family)
        if not isinstance(self.family, Restoring):
            return []
        order, chosen = self.family.order, self.chosen.about if self.chosen else {}
        alone = {impact.unit: impact for impact in self.impacts}
        return [
            {
                "unit": unit,
                "place": order.units.index(unit) + 1,
                "score": order.scores.get(unit),
                "n_parameters": order.sizes[unit],
                "strength": chosen.get("s", 0.0) if unit in chosen.get("units", ()) else 0.0,
                "general_gain": alone[unit].general_gain if unit in alone else None,
                "domain_cost": alone[unit].domain_cost if unit in alone else None,
            }
            for unit in order.sizes
        ]

    def _learnt_layers(self, family: Learned) -> list[dict[str, Any]]:
        """Return every unit with the share of the base that it takes in the chosen merge, or as learnt."""
        shares = self.chosen.about.get("shares", family.shares) if self.chosen else family.shares
        units = learn.units_of([one.name for one in self.scores])
        sizes: dict[str, int] = {}
        for one in self.scores:
            sizes[units[one.name]] = sizes.get(units[one.name], 0) + one.n_parameters
        empty = dict.fromkeys(("score", "general_gain", "domain_cost"))
        return [
            {"unit": unit, "place": n, "n_parameters": sizes.get(unit, 0), "strength": own[0], **empty}
            for n, (unit, own) in enumerate(sorted(shares.items(), key=lambda item: natural(item[0])), start=1)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return ``points.json``."""
        yardstick = self.yardstick
        return {
            "format": FORMAT,
            "method": self.options.method,
            "models": {"base": self.sources.base.name, "tuned": self.sources.tuned.name},
            "experts": [one.name for one in self.sources.others],
            "suites": [judge.spec for judge in self.suites],
            "left_out": yardstick.left_out if yardstick is not None else {},
            "keep": None if self.options.is_fixed else self.options.keep,
            "chosen": self.chosen.label if self.chosen else None,
            "plan_sha256": self.chosen.plan.sha256 if self.chosen else None,
            "why": self.why,
            "restores_outside_blocks": isinstance(self.family, Restoring) and self.family.outside,
            "texts": {side: _about(text) for side, text in self.texts.items()},
            "domain_gain": None
            if yardstick is None
            else {
                "value": _number(yardstick.gain.value),
                "standard_error": yardstick.gain_error,
                "reason": yardstick.gain.reason,
            },
            "points": self.points() if self.desk else [],
            "layers": self.layers(),
            "agreement": {by: {"rho": _number(v.value), "reason": v.reason} for by, v in self.agreements.items()},
            "search_was_cut_short": self.exhausted,
            "bill": self.bill(),
        }


def _place(point: dict[str, Any]) -> Point[str]:
    standing = point["standing"]
    return Point(standing["general"]["value"], standing["domain"]["value"], point["plan_sha256"])


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _about(text: Text) -> dict[str, Any]:
    return {
        "name": Path(text.name).name,
        "documents": len(text.ids),
        "of": text.n_found,
        "tokens": text.n_tokens,
        "sha256": text.sha256,
    }


# --- the job


def prepare(options: Options) -> tuple[Result, Any]:
    """Check, read and score; returns a result without measurements, and the tokenizer.

    Raises:
        ConfigError, NotFoundError, IntegrityError: an input that is missing, damaged or does not fit.
    """
    options.check()
    sources = open_models(options)
    found = {side: read_text(place, side, column=options.text_column) for side, place in _texts(options)}
    tokenizer = load_tokenizer(options.tuned) if found else None
    texts: dict[str, Text] = {side: draw(text, tokenizer, options.n_tokens) for side, text in found.items()}
    models = {"base": sources.base, "tuned": sources.tuned}
    models |= {f"other_{n}": model for n, model in enumerate(sources.others, start=1)}
    weights = {role: _weights_sha256(model) for role, model in models.items()}
    scores, bill = score(options, sources, weights["base"])
    result = Result(
        options=options,
        sources=sources,
        weights=weights,
        family=family_of(options, sources, scores),
        scores=scores,
        scores_bill=bill,
        texts=texts,
        suites=[SuiteJudge(spec) for spec in options.suites],
        retraining=retraining_of(options),
    )
    if options.mergekit:
        middle = 0.5 if options.s is None else options.s
        _mergekit(options, sources, result.family.spot(0.5 if options.method == "spear-mm" else None, middle))
    return result, tokenizer


def merge(options: Options, *, tell: search.Report | None = None) -> Result:
    """Prepare, search and measure; nothing is written but what is kept in the cache folder."""
    result, tokenizer = prepare(options)
    if isinstance(result.family, Learned):
        learn_family(result, tokenizer)
    if result.texts:
        _measure(result, tokenizer, tell)
    else:
        soup = result.family if isinstance(result.family, Soup) else None
        result.chosen = soup.mean(soup.ingredients) if soup else result.family.spot(options.q, options.s or 0.0)
        result.why = f"{result.chosen.label}, as asked; nothing was measured"
    return result


def _texts(options: Options) -> Iterator[tuple[Side, str]]:
    for side in SIDES:
        if (place := getattr(options, side)) is not None:
            yield side, place


def open_models(options: Options) -> Sources:
    """Return the opened models, checked against each other.

    Raises:
        ConfigError, NotFoundError, IntegrityError: see ``tensors``.
    """
    for place in (options.base, options.tuned, *options.experts):
        if not place.is_dir():
            raise NotFoundError("model folder is missing", where=place, mend="give a Hugging Face folder")
    tuned = open_source(options.tuned, f"tuned {options.tuned.resolve().name}")
    base = open_source(options.base, f"base {options.base.resolve().name}")
    others = tuple(open_source(place, place.resolve().name) for place in options.experts)
    found = [
        moments.open_moments(place, model)
        for place, model in zip(options.moments, (options.tuned, *options.experts), strict=False)
    ]
    sources = Sources(
        tuned=tuned,
        base=base,
        others=others,
        moments=found[0] if found else None,
        other_moments=tuple(found[1:]),
    )
    check_compatible(sources.models)
    return sources


def score(options: Options, sources: Sources, base_sha256: str) -> tuple[list[TensorScore], dict[str, float]]:
    """Return the scores of all tensors, and their bill; the base's spectra are kept."""
    start = time.perf_counter()
    spectral = options.method == "spear-mm"
    spectra = Spectra(home() / "merges" / f"spectra-{base_sha256[:24]}.safetensors")
    scorer = Scorer(spectral=spectral, spectra=spectra if spectral else Spectra())

    def pairs() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name, info in sources.tuned.layout.items():
            if info.is_merged:
                yield name, sources.base.read(name), sources.tuned.read(name)
                for model in sources.models:
                    model.done(name)

    found = scorer.score(pairs())
    if spectral:
        spectra.save()
    layout = sources.tuned.layout
    flops = math.fsum(
        flops_of(layout[one.name].shape) * (2 if one.moved else 1) for one in found if one.spectral is not None
    )
    return found, {"flops": flops, "seconds": time.perf_counter() - start}


def _weights_sha256(source: TensorSource) -> str:
    return layout_sha256(source, {name: tensor_sha256(source.read(name)) for name in source.layout})


def family_of(options: Options, sources: Sources, scores: list[TensorScore]) -> Family:
    """Return what is searched."""
    if options.method in SOUPS:
        labels = ["base", "tuned", *(one.name for one in sources.others)]
        return Soup(options.method, labels, with_base=options.soup_base, power=options.power)
    if options.method == "learned-alpha":  # equal shares until there is something to learn on
        n_ends = 1 + len(sources.experts)
        return Learned(dict.fromkeys(learn.units_of(list(sources.tuned.layout)).values(), (1 / n_ends,) * n_ends))
    if options.method != "spear-mm":
        return PathFamily(options.method, sources, seed=options.seed, density=options.density)
    order = order_units(scores, by=options.choose, granularity=options.granularity, seed=options.seed)
    dimensions = {name: len(info.shape) for name, info in sources.tuned.layout.items() if info.is_merged}
    return Restoring(
        order, dimensions, interp=options.interp, outside=options.embeddings, granularity=options.granularity
    )


def retraining_of(options: Options) -> Retraining | None:
    """Return what training the tuned model cost, from the ledger of its run, where there is one.

    A run's release of stage k lies in ``RUN/release/stage-k``; its training took the stages up to k.

    Raises:
        NotFoundError, IntegrityError: a ledger that was named is missing or broken.
    """
    folder = options.tuned.resolve()
    guess = folder.parents[1] / "ledger.json" if folder.parent.name == "release" else None
    path = options.ledger or guess
    if path is None or (options.ledger is None and not path.is_file()):
        return None
    ledger = read_json(path)
    last = folder.name.removeprefix("stage-")
    stage = int(last) if folder.parent.name == "release" and last.isdecimal() else None
    try:
        tokens = {int(k): sum(by_source.values()) for k, by_source in ledger["tokens"].items()}
        n_tokens = sum(n for k, n in tokens.items() if stage is None or k <= stage)
        share = n_tokens / sum(tokens.values())
        extra = {"flops": dict(ledger["flops"]), "seconds": {"train": ledger["seconds"]["train"]}}
        extra["flops"].pop("evaluate", None)
        flops, seconds = (share * math.fsum(extra[unit].values()) for unit in ("flops", "seconds"))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise ConfigError("this is no ledger of a run", where=path, mend="give --ledger RUN/ledger.json") from None
    return Retraining(flops=flops, seconds=seconds, n_tokens=n_tokens)


def address_of(result: Result) -> str:
    """Return the digest of everything but text and plan that a measurement hangs on."""
    options, sources = result.options, result.sources
    files = [file for n in range(len(sources.experts)) for file in moments.files_of(sources.moments_of(n))]
    parts = [
        result.weights,
        digest_of(sources.tuned.config),
        tokenizer_sha256(options.tuned),
        [sha256_file(file) for file in files] or None,
        find_device(options.device).type,
    ]
    return digest_of(parts)


def learn_family(result: Result, tokenizer: Any) -> None:
    """Learn every layer's shares on text that is not measured, or take what was learnt before.

    Raises:
        ConfigError: too little text is left beside what is measured, or the model is not stored as it is loaded.
    """
    options = result.options
    texts = {
        side: draw(read_text(place, side, column=options.text_column), tokenizer, options.n_learn_tokens,
                   without=result.texts[side].ids, least=1)
        for side, place in _texts(options)
    }  # fmt: skip
    settings = [options.mix, options.n_learn_tokens, options.n_learn_steps, learn.LEARNING_RATE]
    key = digest_of(
        [address_of(result), {side: text.sha256 for side, text in texts.items()}, settings, _window(result)]
    )
    file = home() / "merges" / f"learnt-{key[:40]}.json"
    if not file.is_file():
        write_json(file, _learn(result, tokenizer, texts))
    kept = read_json(file)
    result.family = Learned({unit: tuple(own) for unit, own in kept.pop("shares").items()})
    result.learning = kept


def _learn(result: Result, tokenizer: Any, texts: dict[Side, Text]) -> dict[str, Any]:
    from clbench.train.models import model_train_flops

    options, bench = result.options, result.bench(tokenizer)
    if not bench.in_place:
        raise ConfigError("this model is stored otherwise than it is loaded", where=options.tuned, mend="take wise-ft")
    start, length = time.perf_counter(), _window(result)
    portions = learn.portions(texts, tokenizer, length=length, mix=options.mix, n_steps=options.n_learn_steps)
    ends = [result.sources.base.read, *(one.read for one in result.sources.experts)]
    found = learn.learn_shares(bench.model, ends, lambda step: portions[step], n_steps=options.n_learn_steps)
    return {
        "shares": found.shares,
        "losses_nats": found.losses_nats,
        "tokens": found.n_tokens,
        "texts": {side: _about(text) for side, text in texts.items()},
        "flops": model_train_flops(bench.model, found.n_tokens, length),
        "seconds": time.perf_counter() - start,
    }


def _window(result: Result) -> int:
    length = result.sources.tuned.config.get("max_position_embeddings")
    return min(MAX_WINDOW, int(length)) if isinstance(length, int) else MAX_WINDOW


def open_desk(result: Result, tokenizer: Any, tell: search.Report | None) -> Desk:
    """Return what measures; the model is loaded when something has to be measured."""
    texts = result.texts
    judge: Judge = LossJudge(texts["general"], texts["domain"], tokenizer, max_length=_window(result))
    if result.suites:
        judge = JointJudge([judge, *result.suites])
    return search.Desk(
        result.sources,
        judge,
        lambda: result.bench(tokenizer),
        address=address_of(result),
        folder=home() / "merges",
        tell=tell,
    )


def _measure(result: Result, tokenizer: Any, tell: search.Report | None) -> None:
    """Search, then measure controls and impacts."""
    options, desk = result.options, open_desk(result, tokenizer, tell)
    result.desk = desk
    walk = search.Walk(
        desk=desk,
        family=result.family,
        keep=options.keep,
        n_evaluations=options.n_evaluations,
        strengths=options.strengths,
    )
    result.yardstick = walk.yardstick
    if isinstance(result.family, Soup):
        result.chosen = result.family.choose(lambda spot: math.fsum(walk.yardstick.losses(walk.visit(spot).rows)))
        walk.visit(result.chosen)
    elif options.is_fixed:
        result.chosen = result.family.spot(options.q, options.s or 0.0)
        walk.walked.append(desk.measure(result.chosen, "walk"))
    else:
        found = walk.run()
        result.chosen = found.spot if found else None
    result.walked, result.exhausted = walk.walked, walk.exhausted
    if options.controls and result.chosen is not None and result.chosen.plan != TUNED.plan:
        spots = search.controls(result.family, result.chosen, result.scores, result.sources, seed=options.seed)
        result.controls = [(spot, desk.measure(spot, "control")) for spot in spots]
    if options.impact and isinstance(result.family, Restoring):
        result.impacts = search.impacts(desk, result.family, walk.yardstick)
        result.agreements = search.agreements(result.impacts, result.scores, result.family)
    everything = list(desk.found.items())
    standings = walk.yardstick.standings([one.rows for _, one in everything], keep=options.keep)
    result.standings = {key: standing for (key, _), standing in zip(everything, standings, strict=True)}
    result.why = _why(result)


def _why(result: Result) -> str:
    """Return one line about the choice."""
    options, yardstick = result.options, result.yardstick
    assert yardstick is not None
    if result.chosen is not None:
        standing = result.standings[result.chosen.plan.sha256]
        figures = (
            f"general retention {percent(standing.general.value)}, domain gain kept {percent(standing.domain.value)}"
        )
        if options.is_fixed:
            return f"{result.chosen.label}, as asked: {figures}"
        note = "; the evaluations did not suffice to bracket it, raise --evaluations" if result.exhausted else ""
        own = result.chosen.plan == TUNED.plan
        return f"{'the tuned model itself, no merge is needed' if own else result.chosen.label}: {figures}{note}"
    if yardstick.gain.reason is not None:
        return f"there is no domain gain to keep: {yardstick.gain.reason}"
    gaining = [one for one in result.walked if yardstick.kept_gain(one.rows).value > 0]
    best = max(gaining, key=lambda one: yardstick.retention(one.rows))
    standing = result.standings[best.spot.plan.sha256]
    least = f"{percent(options.keep)} of the base's general score"
    what = f"{percent(standing.general.value)} ({best.spot.label}, domain gain kept {percent(standing.domain.value)})"
    hints = ["a lower --keep"]
    if result.exhausted:
        hints.append("more --evaluations")
    hints += ["--embeddings"] if options.method == "spear-mm" and not options.embeddings else []
    hints += ["--method wise-ft"] if options.method != "wise-ft" else []
    return f"nothing keeps {least} and any domain gain: the most is {what}; try {' or '.join(hints)}"


def percent(value: float) -> str:
    """Return a share for people."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "undefined"


# --- writing


def write(result: Result, *, report: Path | None = None, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the chosen model with its plan, points and report, whole or not at all; then what else was asked for.

    Raises:
        ClbenchError: the disk is full or the place forbidden; nothing is half-written.
    """
    from clbench.merge.report import page

    options, chosen = result.options, result.chosen
    if chosen is None:
        raise ValueError("nothing was chosen")
    text = page(result) if report is not None or options.out is not None else ""
    if options.out is not None:
        remove_stale(options.out)
        with atomic_folder(options.out) as temporary:
            first = [result.weights[role] for role in ("tuned", "base")]  # hashed before the search
            known = [*first, *(digest for role, digest in result.weights.items() if role.startswith("other"))]
            merge_folder(chosen.plan, result.sources, temporary / "model", weights_sha256=known, progress=progress)
            for file in sorted((temporary / "model").iterdir()):
                shutil.move(file, temporary / file.name)
            (temporary / "model").rmdir()
            write_json(temporary / "points.json", result.as_dict())
            write_text(temporary / "report.html", text)
    if report is not None:
        write_text(report, text)
    if options.mergekit:
        write_text(options.mergekit, _mergekit(options, result.sources, chosen))
    if options.freeze:
        names = list(result.sources.tuned.layout)
        about = {"method": options.method, "choose": options.choose, "q": chosen.about["q"]}
        write_freeze_list(options.freeze, freeze_list(names, chosen.about["units"], **about))


def _mergekit(options: Options, sources: Sources, spot: Spot) -> str:
    dimensions = {name: len(info.shape) for name, info in sources.tuned.layout.items()}
    return to_mergekit_yaml(
        spot.plan,
        dimensions,
        tuned=str(options.tuned),
        base=str(options.base),
        others=[str(one) for one in options.experts],
        lerp_as_slerp=True,
    )


# --- what it would cost


def forecast(options: Options) -> dict[str, Any]:
    """Check and score everything, measure nothing: the order of the units, and the most that a search would cost."""
    result, tokenizer = prepare(options)
    family, texts = result.family, result.texts
    found: dict[str, Any] = {"method": options.method, "layers": result.layers(), "scores": result.scores_bill}
    n = 1 if options.is_fixed else options.n_evaluations
    if options.method in ("greedy-soup", "mwa"):  # every ingredient, and of greedy soups a mean for each
        n = (2 if options.method == "greedy-soup" else 1) * len(result.sources.models)
    n_controls = (10 + options.embeddings) if options.controls else 0
    found["evaluations"] = {"ends": 2, "walk": n, "controls": n_controls} if texts else {}
    if options.impact and isinstance(family, Restoring):
        found["evaluations"]["impact"] = len(family.order.units)
    if texts:
        desk = open_desk(result, tokenizer, None)
        bench = result.bench(tokenizer)
        tokens, flops = desk.judge.cost(bench.checkpoint(bench.model, TUNED.plan))
        total = sum(found["evaluations"].values())
        found |= {"texts": {side: _about(text) for side, text in texts.items()}}
        found["at_most"] = {"evaluations": total, "tokens": total * tokens, "flops": total * flops}
    if result.retraining is not None:
        found["retraining"] = vars(result.retraining)
    return found
