"""Merge plans: which kernel with which options goes to which tensor. Plain values that are stored, hashed and exported.

The first rule that matches a tensor decides, else the default does. A selector matches whole parts of a dotted name, so
``layers.1`` is not ``layers.10``. A plan knows no weights; ``execute`` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clbench.errors import ConfigError, did_you_mean
from clbench.files import digest_of

FORMAT = 1
Value = float | int | bool | str | list[float]
Only = Literal["all", "matrices", "vectors"]

NUMBER, FLAG, TEXT, NUMBERS = (int, float), (bool,), (str,), (list, tuple)
OPTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "keep": {},
    "restore": {},
    "lerp": {"s": NUMBER, "extrapolate": FLAG},
    "slerp": {"s": NUMBER, "extrapolate": FLAG},
    "nuslerp": {"t": NUMBER},
    "task_arithmetic": {"weights": NUMBERS},
    "ties": {"density": NUMBER, "weights": NUMBERS, "scale": NUMBER, "normalize": FLAG},
    "dare": {"density": NUMBER, "seed": NUMBER, "rescale": TEXT},
    "breadcrumbs": {"density": NUMBER, "gamma": NUMBER},
    "model_stock": {"scale": NUMBER},
    "dg_hard": {"scale": NUMBER, "min_numel": NUMBER},
    "graft": {"threshold": NUMBER, "density": NUMBER},
    "ota": {
        "power": NUMBER,
        "floor": NUMBER,
        "thresholds": NUMBERS,
        "densities": NUMBERS,
        "scales": NUMBERS,
        "fallback": TEXT,
    },
    "mean": {"shares": NUMBERS},
    "reduce_intruders": {"factor": NUMBER, "top_k": NUMBER, "epsilon": NUMBER, "rank": NUMBER},
    "neighbours": {"s": NUMBER, "below": NUMBER, "above": NUMBER, "weights": NUMBERS},
}
"""Kernels and their options. ``keep`` copies the tuned tensor, ``restore`` the base's."""
REQUIRED = {
    "lerp": ("s",),
    "slerp": ("s",),
    "nuslerp": ("t",),
    "task_arithmetic": ("weights",),
    "ties": ("density",),
    "dare": ("density", "seed"),
    "breadcrumbs": ("density",),
    "mean": ("shares",),
}
UNIT = ("s", "t", "density", "gamma", "densities", "factor", "epsilon")


@dataclass(frozen=True)
class Action:
    """A kernel and its options."""

    kernel: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no kernel takes.

        Raises:
            ConfigError: an unknown kernel or option, one missing, or one of the wrong type or range.
        """
        if self.kernel not in OPTIONS:
            raise ConfigError(f"unknown kernel {self.kernel!r}", mend=did_you_mean(self.kernel, OPTIONS))
        known = OPTIONS[self.kernel]
        for key, value in self.options.items():
            if key not in known:
                raise ConfigError(f"kernel {self.kernel} has no option {key!r}", mend=did_you_mean(key, known))
            self._check(key, value, known[key])
        for key in REQUIRED.get(self.kernel, ()):
            if key not in self.options:
                raise ConfigError(f"kernel {self.kernel} needs the option {key}", mend="give it")
        if self.kernel == "ota" and {"thresholds", "densities"} <= self.options.keys():
            raise ConfigError("ota takes thresholds or densities", mend="give one of them")
        if self.kernel == "graft" and len(self.options) != 1:
            raise ConfigError("graft takes a threshold or a density", mend="give one of them")

    def _check(self, key: str, value: Value, types: tuple[type, ...]) -> None:
        is_flag = isinstance(value, bool)
        if not isinstance(value, types) or is_flag != (types is FLAG):
            raise ConfigError(f"{self.kernel}: {key}={value!r} is of the wrong type", mend=f"give {types[0].__name__}")
        numbers = value if isinstance(value, list | tuple) else [value] if types is NUMBER else []
        bad = not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
        free = key not in UNIT or bool(self.options.get("extrapolate"))
        if bad or not (free or all(0 <= float(one) <= 1 for one in numbers)):
            raise ConfigError(f"{self.kernel}: {key}={value} is out of range", mend="give numbers from 0 to 1")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()}
        return {"kernel": self.kernel, "options": options}

    def __hash__(self) -> int:
        return hash(digest_of(self.as_dict()))


KEEP, RESTORE = Action("keep"), Action("restore")


@dataclass(frozen=True)
class Rule:
    """Tensors and what is done with them.

    Args:
        select: parts of a dotted name that must stand in a tensor's name side by side, such as ``layers.7.mlp``; ``*``
            is any one part, ``=model.norm.weight`` is that whole name, and ``*`` alone is every tensor.
        action: what is done.
        only: ``matrices`` (two dimensions or more) or ``vectors`` (fewer).
    """

    select: str
    action: Action
    only: Only = "all"

    def __post_init__(self) -> None:
        """Refuse an empty selector and an unknown restriction."""
        if not self.select.strip("=") or "" in self.select.lstrip("=").split("."):
            raise ConfigError(f"selector {self.select!r} has an empty part", mend="give whole parts: layers.7.mlp")
        if self.only not in ("all", "matrices", "vectors"):
            raise ConfigError(f"only={self.only!r} is unknown", mend="give all, matrices or vectors")

    def matches(self, name: str, n_dimensions: int) -> bool:
        """Return whether a tensor is selected."""
        if self.only != "all" and (self.only == "matrices") != (n_dimensions >= 2):
            return False
        return selects(self.select, name)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"select": self.select, "only": self.only, **self.action.as_dict()}


def selects(selector: str, name: str) -> bool:
    """Return whether a selector matches whole parts of a dotted name."""
    if selector.startswith("="):
        return name == selector[1:]
    wanted, parts = selector.split("."), name.split(".")
    return any(
        all(want in ("*", part) for want, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


@dataclass(frozen=True)
class MergePlan:
    """What is done with every tensor of a model.

    Args:
        default: what is done where no rule matches.
        rules: the first that matches counts.
    """

    default: Action = KEEP
    rules: tuple[Rule, ...] = ()

    def action(self, name: str, n_dimensions: int) -> Action:
        """Return what is done with a tensor."""
        matching = (rule.action for rule in self.rules if rule.matches(name, n_dimensions))
        return next(matching, self.default)

    def actions(self, dimensions: Mapping[str, int]) -> dict[str, Action]:
        """Return what is done with each tensor, given its number of dimensions.

        Raises:
            ConfigError: a rule selects no tensor at all.
        """
        for rule in self.rules:
            if not any(rule.matches(name, n) for name, n in dimensions.items()):
                mend = did_you_mean(rule.select, list(dimensions)[:1000])
                raise ConfigError(f"selector {rule.select!r} ({rule.only}) matches no tensor", mend=mend)
        return {name: self.action(name, n) for name, n in dimensions.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"format": FORMAT, "default": self.default.as_dict(), "rules": [rule.as_dict() for rule in self.rules]}

    @property
    def sha256(self) -> str:
        """Digest of the plan."""
        return digest_of(self.as_dict())

    @classmethod
    def from_dict(cls, values: Any) -> MergePlan:
        """Return the plan that ``as_dict`` described.

        Raises:
            ConfigError: it is no plan.
        """
        try:
            if values["format"] != FORMAT:
                raise ConfigError(f"merge plan of format {values['format']}", mend=f"this version reads {FORMAT}")
            default = Action(values["default"]["kernel"], dict(values["default"]["options"]))
            rules = [
                Rule(one["select"], Action(one["kernel"], dict(one["options"])), one["only"]) for one in values["rules"]
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"this is no merge plan: {type(error).__name__} {error}") from None
        return cls(default, tuple(rules))


# --- mergekit ---------------------------------------------------------------------------------------------------------


def to_mergekit_yaml(
    plan: MergePlan,
    dimensions: Mapping[str, int],
    *,
    tuned: str,
    base: str,
    others: Sequence[str] = (),
    lerp_as_slerp: bool = False,
) -> str:
    """Return the plan as a configuration of mergekit >= 0.1.5.

    mergekit runs one method over a whole model and selects by substring. So there may be one kernel besides ``keep``
    and ``restore``, and its filters are checked against all names. Random kernels draw other masks there.

    Args:
        plan: the plan.
        dimensions: name -> number of dimensions of every tensor.
        tuned: the tuned model, as mergekit shall find it.
        base: the base.
        others: further models.
        lerp_as_slerp: write LERP of vectors beside SLERP of matrices as SLERP, which is LERP for small angles.

    Raises:
        ConfigError: mergekit cannot express it.
    """
    import yaml

    actions = plan.actions(dimensions)
    kernels = {action.kernel for action in actions.values()} - {"keep", "restore"}
    if lerp_as_slerp and kernels == {"lerp", "slerp"}:
        kernels = {"slerp"}
    if len(kernels) > 1:
        raise ConfigError(f"mergekit runs one method a merge, this plan has {' and '.join(sorted(kernels))}")
    kernel = next(iter(kernels), "lerp")
    if kernel in ("lerp", "slerp"):
        config = _path_config(kernel, actions, tuned, base)
    else:
        config = _delta_config(kernel, actions, [tuned, *others], base)
    text: str = yaml.safe_dump({**config, "dtype": "float32"}, sort_keys=False)
    return text


def _path_config(kernel: str, actions: Mapping[str, Action], tuned: str, base: str) -> dict[str, Any]:
    """Return SLERP with t = s from the tuned to the base model, or a weighted mean."""
    strengths = {name: _strength(action) for name, action in actions.items()}
    if kernel == "slerp":
        parameters = {"t": filters(strengths)}
        return {"merge_method": "slerp", "base_model": tuned, "models": _models(tuned, base), "parameters": parameters}
    weights = [
        {"model": tuned, "parameters": {"weight": filters({name: 1 - s for name, s in strengths.items()})}},
        {"model": base, "parameters": {"weight": filters(strengths)}},
    ]
    return {"merge_method": "linear", "models": weights, "parameters": {"normalize": False}}


def _models(*names: str) -> list[dict[str, Any]]:
    return [{"model": name} for name in names]


def _strength(action: Action) -> float:
    s = action.options.get("s", {"keep": 0.0, "restore": 1.0}.get(action.kernel))
    assert isinstance(s, int | float)
    return float(s)


def _delta_config(kernel: str, actions: Mapping[str, Action], models: Sequence[str], base: str) -> dict[str, Any]:
    """Return one method with the same options for every tensor."""
    if len(set(actions.values())) > 1:
        raise ConfigError(f"{kernel} beside other actions cannot be exported", mend="give one action for all tensors")
    options = dict(next(iter(actions.values())).options)
    given = options.pop("weights", [1.0] * len(models))
    weights = list(given) if isinstance(given, list | tuple) else []
    if len(weights) != len(models):
        raise ConfigError(f"{kernel} has {len(weights)} weights for {len(models)} models", mend="give one a model")
    config: dict[str, Any] = {"base_model": base, "models": _models(base, *models)}
    if kernel == "model_stock":
        if options.get("scale", 1.0) != 1:
            raise ConfigError("mergekit's model_stock has no scale", mend="give scale 1, which is -s 0")
        return {"merge_method": "model_stock", **config}
    if kernel == "nuslerp" and len(models) == 2:
        t = options["t"]
        assert isinstance(t, int | float)
        return {"merge_method": "nuslerp", "base_model": base, "models": _weighted(models, [1 - t, t], {})}
    per_model: dict[str, Value] = {key: options[key] for key in ("density", "gamma") if key in options}
    method = {"ties": "ties", "task_arithmetic": "task_arithmetic", "breadcrumbs": "breadcrumbs", "dare": "dare_linear"}
    if kernel not in method or (kernel == "dare" and options.get("rescale") != "l1"):
        raise ConfigError(
            f"mergekit has no {kernel} like ours", mend="dare needs rescale=l1; dg_hard and graft have none"
        )
    parameters: dict[str, Any] = {"normalize": bool(options.get("normalize", kernel == "ties"))}
    parameters["lambda"] = options.get("scale", 1.0)
    config["models"] = [*_models(base), *_weighted(models, weights, per_model)]
    return {"merge_method": method[kernel], **config, "parameters": parameters}


def _weighted(models: Sequence[str], weights: Sequence[float], more: dict[str, Value]) -> list[dict[str, Any]]:
    pairs = zip(models, weights, strict=True)
    return [{"model": model, "parameters": {"weight": weight, **more}} for model, weight in pairs]


def filters(values: Mapping[str, float]) -> list[dict[str, Any]] | float:
    """Return mergekit's filter list that gives every tensor its value; one number where all are equal.

    A filter is a substring and the first one that matches counts. So longer ones stand first, tensors that another's
    filter would catch get one of their own, and the outcome is checked by mergekit's own rule.
    """
    common = max(set(values.values()), key=lambda value: (list(values.values()).count(value), -value))
    if len(set(values.values())) == 1:
        return common
    chosen = {prefix: value for prefix, value in _uniform(values) if value != common}
    caught = {name: value for name, value in values.items() if _first(_entries(chosen, common), name) != value}
    entries = _entries(chosen | caught, common)
    for name, value in values.items():
        if _first(entries, name) != value:
            raise ConfigError(f"mergekit's substring filters cannot tell {name} from other tensors")
    return entries


def _entries(chosen: Mapping[str, float], common: float) -> list[dict[str, Any]]:
    """Return filters with the longest first, then the value of all others."""
    ordered = sorted(chosen.items(), key=lambda item: (-len(item[0]), item[0]))
    return [*({"filter": prefix, "value": value} for prefix, value in ordered), {"value": common}]


def _first(entries: Iterable[dict[str, Any]], name: str) -> float:
    """Return the value that mergekit gives a tensor."""
    return next(float(entry["value"]) for entry in entries if entry.get("filter", "") in name)


def _uniform(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the shortest prefixes (ending in a dot) and names under which all tensors have one value."""
    taken: set[str] = set()
    for name, value in values.items():
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) + "." for n in range(1, len(parts))] + [name]
        for prefix in prefixes:
            below = {other: v for other, v in values.items() if other.startswith(prefix)}
            if len(set(below.values())) == 1:
                if prefix not in taken:
                    taken.add(prefix)
                    yield prefix, value
                break
