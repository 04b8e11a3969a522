"""Finds content by name: built-in folders, entry points of installed packages, and file or module paths.

A name is a file's name (``replay`` is ``methods/replay.py``; ``-`` and ``_`` are the same); there is no registration
step. ``my/file.py``, ``my/file.py:Class`` and ``package.module:Class`` work wherever a name does; a stream may also be
a YAML specification (``clbench.specification``), by name or path. Options follow a colon:
``NAME:option=value,option=value``. Nothing is imported before it is asked for. This is the only place where the engine
reaches content.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from clbench.errors import ConfigError, NotFoundError, did_you_mean
from clbench.files import sha256_bytes, sha256_file
from clbench.method import Method, option_fields
from clbench.specification import StreamSpecification, read_specification, saved_specifications
from clbench.stream import StreamSource
from clbench.suite import Suite
from clbench.track import Track

Kind = Literal["methods", "streams", "suites"]
PACKAGES: dict[Kind, str] = {
    "methods": "clbench.methods",
    "streams": "clbench.streams",
    "suites": "clbench.eval",
}
BASE_CLASSES: dict[Kind, type] = {"methods": Method, "streams": StreamSource, "suites": Suite}
SPEC = re.compile(r"(?P<target>.+?)(?::(?P<options>[A-Za-z_]\w*=.*))?")


def canonical(name: str) -> str:
    """Return the spelling under which names are compared."""
    return name.replace("_", "-")


@cache
def _available(kind: Kind) -> dict[str, str | EntryPoint]:
    """Return canonical name -> module name or entry point; a name given twice is refused."""
    package = importlib.import_module(PACKAGES[kind])
    found: dict[str, str | EntryPoint] = {
        canonical(module.name): f"{PACKAGES[kind]}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }
    for entry in entry_points(group=f"clbench.{kind}"):
        name = canonical(entry.name)
        if name in found:
            raise ConfigError(
                f"two {kind} are called {name!r}",
                where=f"entry point {entry.value}",
                mend="uninstall or rename one of them",
            )
        found[name] = entry
    return found


def names(kind: Kind) -> list[str]:
    """Return the names known without a path, sorted; modules without a class of this kind are left out."""
    return sorted(name for name in _available(kind) if _has_class(kind, name))


def _has_class(kind: Kind, name: str) -> bool:
    entry = _available(kind)[name]
    if isinstance(entry, EntryPoint):
        return True
    # A module whose class has no name of its own (streams/hub.py) is used through specifications.
    return any(_is_content(cls, kind) for cls in _own_classes(importlib.import_module(entry), BASE_CLASSES[kind]))


def _is_content(cls: type, kind: Kind) -> bool:
    return kind != "streams" or bool(getattr(cls, "name", ""))


def load_class(kind: Kind, target: str) -> Any:
    """Return the class behind a name, a file path or ``module:Class``.

    Raises:
        NotFoundError: nothing is called so; near misses are suggested.
        ConfigError: the module holds no class of this kind, or several.
    """
    base = BASE_CLASSES[kind]
    module_name, _, class_name = target.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        module = _import_file(Path(module_name).expanduser())
        return _pick(module, base, class_name, name=canonical(Path(module_name).stem))
    if class_name and canonical(module_name) in _available(kind):
        raise ConfigError(f"option {class_name!r} has no value", where=target, mend="write NAME:option=value")
    if class_name:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise NotFoundError(f"no module {error.name!r}", where=target, mend="install it or mend the name") from None
        return _pick(module, base, class_name, name=canonical(module_name.rpartition(".")[2]))
    name = canonical(target)
    entry = _available(kind).get(name)
    if entry is None:
        known = stream_names() if kind == "streams" else names(kind)
        raise NotFoundError(f"unknown {kind.rstrip('s')} {target!r}", mend=did_you_mean(name, known))
    if isinstance(entry, EntryPoint):
        loaded = entry.load()
        return loaded if isinstance(loaded, type) else _pick(loaded, base, "", name=name)
    return _pick(importlib.import_module(entry), base, "", name=name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NotFoundError("file is missing", where=path, mend="give the path of a Python file")
    name = f"clbench_file_{path.stem}_{sha256_bytes(str(path.resolve()).encode())[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"cannot be imported: {type(error).__name__}: {error}", where=path) from error
    return module


def _own_classes(module: ModuleType, base: type) -> list[type]:
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _pick(module: ModuleType, base: type, class_name: str, *, name: str) -> type:
    classes = _own_classes(module, base)
    if class_name:
        classes = [cls for cls in classes if cls.__name__ == class_name]
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ConfigError(
            f"expected one {base.__name__} class{' called ' + class_name if class_name else ''}, found: {found}",
            where=module.__file__,
            mend="name it as FILE.py:Class",
        )
    cls = classes[0]
    if not getattr(cls, "name", ""):
        cls.name = name  # type: ignore[attr-defined]
    return cls


@dataclass(frozen=True)
class Component:
    """One resolved part of a method: where it was found, and its options in full."""

    name: str
    target: str
    method: Method

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-able form that stands in ``run.yaml``."""
        values = {key: getattr(self.method.options, key) for key in option_fields(type(self.method))}
        found = {"name": self.name, "target": self.target, "options": values}
        module = sys.modules[type(self.method).__module__]
        if module.__name__.startswith(f"{PACKAGES['methods']}.") or module.__file__ is None:
            return found
        # An edited file is another method: its runs must not go on in, or be taken for, those of the old one.
        return {**found, "source_sha256": sha256_file(Path(module.__file__))}


def make_method(spec: str) -> Component:
    """Build one method from ``NAME``, or ``NAME:option=value,option=value``.

    Raises:
        NotFoundError: unknown name.
        ConfigError: unknown option, or a value of the wrong type.
    """
    target, given = _split(spec, "method")
    return build_component(target, given)


def _split(spec: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Return the target and the options of ``TARGET:option=value,option=value``."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{kind} {spec!r} cannot be read", mend="write NAME or NAME:option=value,option=value")
    given = {}
    for pair in (match["options"] or "").split(",") if match["options"] else []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"option {pair!r} has no value", where=spec, mend="write option=value")
        given[key.strip()] = value.strip()
    return match["target"], given


def build_component(target: str, given: dict[str, Any]) -> Component:
    """Build one method from its target and options, as ``run.yaml`` holds them."""
    cls = load_class("methods", target)
    return Component(name=cls.name, target=target, method=cls(_options("methods", cls, given, where=target)))


def _options(kind: Kind, cls: type, given: dict[str, Any], *, where: str) -> Any:
    """Return a checked ``cls.Options``; texts are read as what the field is, ``a+b`` as several values."""
    options: type = cls.Options  # type: ignore[attr-defined]
    known = {field.name: str(field.type) for field in fields(options)}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{kind.rstrip('s')} {cls.name!r} has no option {key!r}", mend=did_you_mean(key, known))  # type: ignore[attr-defined]
        if isinstance(value, str) and known[key].startswith("tuple"):
            given = {**given, key: value.split("+")}
    try:
        return TypeAdapter(options).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"option {at}: {first['msg']}", where=where, mend=f"see `clbench list {kind}`") from None


def label_of(components: Sequence[Component]) -> str:
    """Return the readable name of a composed method: names with the options that differ from their defaults."""
    labels = []
    for component in components:
        defaults = option_fields(type(component.method))
        changed = [
            f"{key}={getattr(component.method.options, key)}"
            for key, default in defaults.items()
            if getattr(component.method.options, key) != default
        ]
        labels.append(component.name + (":" + ",".join(changed) if changed else ""))
    return "+".join(labels)


def make_stream_source(target: str) -> StreamSource:
    """Return a stream source: ``NAME``, ``FILE.py[:Class]`` or ``module:Class``, with options, or a specification.

    Raises:
        NotFoundError: nothing is called so; near misses are suggested.
        ConfigError: an option is unknown, missing or of the wrong type, or the specification cannot be used.
    """
    name, given = _split(target, "stream")
    if target.endswith((".yaml", ".yml")) and not given:  # codedocs:manifest=FILE.yaml is an option's value
        return source_of(read_specification(Path(target).expanduser()))
    if (path := specifications().get(canonical(name))) is not None:
        read = read_specification(path)
        return source_of(read.model_copy(update={"options": {**read.options, **given}}))
    return _make_source(name, given, {})


def source_of(specification: StreamSpecification) -> StreamSource:
    """Return the source that a specification describes."""
    overrides = {"name": specification.name, **specification.overrides()}
    return _make_source(specification.source, dict(specification.options), overrides)


def source_from_recipe(recipe: Mapping[str, Any]) -> StreamSource:
    """Return the source that ``StreamSource.recipe`` says how to make, in another process."""
    return _make_source(recipe["target"], dict(recipe["options"]), dict(recipe["overrides"]))


def _make_source(target: str, given: dict[str, Any], overrides: dict[str, Any]) -> StreamSource:
    cls = load_class("streams", target)
    if cls.Options is StreamSource.Options and not given:
        source: StreamSource = cls()
    else:
        source = cls(_options("streams", cls, given, where=target))
    for attribute, value in overrides.items():
        setattr(source, attribute, value)
    source.recipe = {"target": target, "options": given, "overrides": overrides}
    return source


def specifications() -> dict[str, Path]:
    """Return canonical name -> file of the stream specifications that are known by name.

    A YAML file in ``streams/`` that has a Python file of the same name beside it is that one's data.
    """
    folder = Path(str(next(iter(importlib.import_module(PACKAGES["streams"]).__path__))))
    built_in = {canonical(p.stem): p for p in sorted(folder.glob("*.yaml")) if not p.with_suffix(".py").is_file()}
    saved = {canonical(name): path for name, path in saved_specifications().items()}
    return saved | built_in


def stream_names() -> list[str]:
    """Return the names of all streams that need no path: classes and specifications, sorted."""
    return sorted({*names("streams"), *specifications()})


def is_stream(target: str) -> bool:
    """Return whether a target can only be a stream: a known name, Python code, or a YAML file that names a source."""
    if target.endswith((".yaml", ".yml")) and not _split(target, "stream")[1]:
        try:
            content = yaml.safe_load(Path(target).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return False  # read again as a track, which says what is wrong
        return isinstance(content, dict) and "source" in content
    name = target.partition(":")[0]
    return canonical(name) in stream_names() or "." in name or "/" in name


def suite_class(spec: str) -> tuple[type[Suite], Any]:
    """Return the class and the checked options of ``NAME``, ``FILE.py[:Class]`` or ``module:Class``, with options.

    Raises:
        NotFoundError: unknown name.
        ConfigError: unknown option, or a value of the wrong type.
    """
    target, given = _split(spec, "suite")
    cls = load_class("suites", target)
    return cls, _options("suites", cls, given, where=spec)


def make_suite(spec: str, stream: Any = None) -> Suite:
    """Return a suite as ``suite_class`` reads it; the stream may be missing where the suite needs none."""
    cls, options = suite_class(spec)
    return cls(stream, options)


def tool(module: str) -> ModuleType:
    """Return a module of ``clbench.leaderboard`` that a command needs (site, report, submission)."""
    return importlib.import_module(f"clbench.leaderboard.{module}")


def tracks_folder() -> Path:
    """Return the folder of the built-in tracks."""
    package = importlib.import_module("clbench.leaderboard")
    return Path(str(next(iter(package.__path__)))) / "tracks"


def track_names() -> list[str]:
    """Return the names of the built-in tracks."""
    return sorted(path.stem for path in tracks_folder().glob("*.yaml"))


def track_path(name: str) -> Path:
    """Return the file of a track given by name or path."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise NotFoundError("track file is missing", where=path)
        return path
    path = tracks_folder() / f"{canonical(name)}.yaml"
    if not path.is_file():
        raise NotFoundError(f"unknown track {name!r}", mend=did_you_mean(canonical(name), track_names()))
    return path


def load_track(name: str) -> Track:
    """Return a track by name, or from a YAML file.

    Raises:
        NotFoundError: unknown name or missing file.
        ConfigError: the file does not describe a track; the first problem is named.
    """
    path = track_path(name)
    try:
        return Track.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}".replace("\n", " "), where=path) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ConfigError(f"{where}: {first['msg']}", where=path, mend="see docs/tracks.md") from None
