"""The contract suite: what is right passes, and each planted bug fails the check that is about it, and no other."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from clbench import registry
from clbench.contract.lab import Lab
from clbench.contract.methods import METHOD_CHECKS, MethodCase
from clbench.contract.problems import problems_of
from clbench.contract.streams import STREAM_CHECKS, StreamCase
from clbench.contract.suites import SUITE_CHECKS, SuiteCase
from clbench.contract.watch import Watched
from clbench.method import Batch, Context, Cosine, Method, Need, Stage, StagePlan, Weights
from clbench.stream import Document, StageInfo, StreamSource
from clbench.streams.tinydocs import Tinydocs
from clbench.suite import UNDEFINED, Checkpoint, Rows, Suite

PICKLED_ONE = b"\x80\x04K\x01."
"""The number 1 as pickle writes it."""


@pytest.fixture(scope="module")
def lab(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("contract"))


def of_method(lab: Lab, cls: type[Method]) -> MethodCase:
    """The case of a class of this file."""

    def make() -> Method:
        method = cls()
        method.name = cls.__name__.lower()
        return method

    return MethodCase(lab, cls.__name__, make)


# --- what is right passes ---


VARIANTS = [
    "replay:fraction=1/t",
    "rsqrt:reading=branch",
    "wsd:decay=0.5",
    "infinite:rewarm=true",
    "schedule-free:restart=false",
    "soup:kind=greedy,base=true,last=2,rows=2",
    "ema:scope=run,restart=true,half_life=0.3",
    "mwa:of=stages,last=2,rows=2,control=seen",
    "replay-buffer:tokens=2000,policy=quota",
    "weighted-replay:by=loss",
    "lwf:teacher=base,scaling=tic_lm",
    "lwf:top_k=4",
    "lora:scope=stage",
    "gem:margin=0,ridge=0",
    "agem:stage_0=false,micro_rows=3",
    "der:match=kl,stage_0=false",
    "proxy-fda:kind=relational,layers=last",
    "spear-mm:towards=previous,choose=random",
    "spear-mm:choose=uniform",
    "wise-ft:interp=slerp,towards=previous",
    "task-vector:kind=dare",
    "rank1-ewc:estimate=directional,apply=prox,per_layer=true,rows=32",
    "rank1-ewc:estimate=micro_batch,dtype=bf16,direction=random",
    "rank1-ewc:direction=top,scale=trace,unit=lambda,strength=1,rows=16,params=matrices",
    "ewc:variant=online,gamma=0.5,apply=prox,params=no_embed",
    "l2-sp:anchor=previous,scale=trace,apply=prox,params=no_norms",
    "l2-init:variant=resampled",
    "shrink-perturb:when=stage",
    "redo:steps=2,tau=0.5",
    "continual-backprop:steps=1,rate=0.05,maturity=1,rows=2",
]
NEED_OPTIONS = {"deletions", "redo", "continual-backprop"}
"""One needs a file; the others do nothing by default in stages as short as these, see VARIANTS."""


@pytest.mark.parametrize("spec", [*(name for name in registry.names("methods") if name not in NEED_OPTIONS), *VARIANTS])
def test_a_built_in_method_passes(lab: Lab, spec: str) -> None:
    assert problems_of(MethodCase.of(lab, spec), METHOD_CHECKS) == {}


class Everything(Method):
    """Uses every need and every seam as it should: nothing in it is a bug."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of this method."""

        strength: float = 0.5
        """Weight of the distillation term."""

    needs = frozenset(Need)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.anchor: Weights = {}
        self.average: Weights = {}
        self.teacher: torch.nn.Module | None = None

    def plan(self, stage: Stage) -> StagePlan:
        return StagePlan(
            mixture={stage.index: 0.75, 0: 0.25},
            schedule=Cosine(peak=stage.learning_rate / 2, warmup_steps=1, floor=0.5),
            optimizer="carry",
        )

    def begin_stage(self, ctx: Context) -> None:
        self.anchor = ctx.base_weights()

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor:
        model = ctx.module
        if self.teacher is None:  # also after a resume
            self.teacher = ctx.second_model()
            own = dict(self.teacher.named_parameters())
            for name, tensor in self.anchor.items():
                own[name].data.copy_(tensor)
        assert model is ctx.module
        with torch.no_grad():
            target_BTV = self.teacher(input_ids=batch.inputs_BT).logits.log_softmax(-1)
        mask_BT = batch.targets_BT >= 0
        ctx.bill("teacher", flops=ctx.forward_flops(int(mask_BT.sum())))
        logs_BTV = logits_BTV.float().log_softmax(-1)
        kl_BT = (target_BTV.exp() * (target_BTV - logs_BTV)).sum(-1)
        total: torch.Tensor = self.options.strength * (kl_BT * mask_BT).sum()
        return total

    def edit_gradients(self, ctx: Context) -> None:
        noise = torch.Generator().manual_seed(ctx.seed("noise"))
        for _, parameter in ctx.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(torch.randn(parameter.shape, generator=noise), alpha=1e-5)

    def after_step(self, ctx: Context) -> None:
        assert ctx.optimizer_moments()
        for name, parameter in ctx.parameters():
            old = self.average.get(name, parameter.detach())
            self.average[name] = torch.lerp(old, parameter.detach(), 0.5)

    def end_stage(self, ctx: Context) -> None:
        assert ctx.control_loss([0, ctx.stage.index], n_rows=2)[0] > 0
        for source in (0, ctx.stage.index):
            for batch in ctx.batches(source, n_rows=2, name="fisher"):
                loss = torch.nn.functional.cross_entropy(
                    ctx.module(input_ids=batch.inputs_BT).logits.flatten(0, 1), batch.targets_BT.flatten()
                )
                torch.autograd.grad(loss, [p for _, p in ctx.parameters()])
                n_tokens = int((batch.targets_BT >= 0).sum())
                ctx.bill("fisher", flops=3 * ctx.forward_flops(n_tokens), n_tokens=n_tokens)

    def release(self, ctx: Context, weights: Weights) -> Weights:
        return {name: self.average.get(name, tensor) for name, tensor in weights.items()}

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        tensors = {f"average/{k}": t for k, t in self.average.items()}
        return tensors | {f"anchor/{k}": t for k, t in self.anchor.items()}, {}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        split = {key: t for key, t in tensors.items()}
        self.average = {k.removeprefix("average/"): t for k, t in split.items() if k.startswith("average/")}
        self.anchor = {k.removeprefix("anchor/"): t for k, t in split.items() if k.startswith("anchor/")}


def test_a_method_that_uses_every_seam_as_it_should_passes(lab: Lab) -> None:
    case = of_method(lab, Everything)
    assert problems_of(case, METHOD_CHECKS) == {}
    notes = case.run[0].notes
    assert notes.flops_billed == pytest.approx(sum(notes.flops_seen.values()), rel=1e-6)
    assert set(notes.flops_seen) == {"extra_loss", "end_stage", "end_stage (backward)"}


def test_the_watch_knows_every_seam() -> None:
    seams = {name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")}
    assert seams - {"Options"} <= set(vars(Watched)), "a new seam of Method has to be passed on by Watched"


# --- planted bugs ---


class Forgets(Method):
    """Counts steps and acts on the count, which is not in its state."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.steps = 0

    def edit_gradients(self, ctx: Context) -> None:
        self.steps += 1
        for _, parameter in ctx.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1.0 if self.steps % 3 else -1.0)


class LiveAnchor(Method):
    """Keeps the live parameters as its anchor."""

    needs = frozenset({Need.STAGE_BOUNDARIES})
    anchor: ClassVar[Weights] = {}

    def begin_stage(self, ctx: Context) -> None:
        self.anchor = {name: p.detach() for name, p in ctx.parameters()}  # type: ignore[misc]

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return dict(self.anchor), {}


class Undeclared(Method):
    """Asks for the base weights without saying so."""

    def after_step(self, ctx: Context) -> None:
        ctx.base_weights()


class OwnCopy(Method):
    """Copies the model behind the context's back."""

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> None:
        import copy

        n_tokens = int((batch.targets_BT >= 0).sum())
        with torch.no_grad():
            copy.deepcopy(ctx.module)(input_ids=batch.inputs_BT)
        ctx.bill("teacher", flops=ctx.forward_flops(n_tokens))


class Unbilled(Method):
    """Runs a teacher that stands on no bill."""

    needs = frozenset({Need.SECOND_MODEL})

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target_BTV = ctx.second_model()(input_ids=batch.inputs_BT).logits
        return 1e-3 * (logits_BTV - target_BTV).pow(2).sum()


class UnbilledBackward(Method):
    """Bills the forward pass of a Fisher estimate and forgets its backward pass."""

    needs = frozenset({Need.STAGE_BOUNDARIES, Need.CURRENT_DATA})

    def end_stage(self, ctx: Context) -> None:
        for batch in ctx.batches(ctx.stage.index, n_rows=2, name="fisher"):
            loss = ctx.module(input_ids=batch.inputs_BT).logits.logsumexp(-1).sum()
            torch.autograd.grad(loss, [p for _, p in ctx.parameters()])
            ctx.bill("fisher", flops=ctx.forward_flops(int((batch.targets_BT >= 0).sum())))


class GlobalNoise(Method):
    """Draws from torch's global generator, which the loop happens to seed at every step."""

    def edit_gradients(self, ctx: Context) -> None:
        for _, parameter in ctx.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(torch.randn(parameter.shape), alpha=1e-4)


class HalfMixture(Method):
    """Leaves half of the budget to nobody."""

    def plan(self, stage: Stage) -> StagePlan:
        return StagePlan(mixture={stage.index: 0.5})


class Pickles(Method):
    """Saves an object as bytes."""

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return {}, {"object": PICKLED_ONE}


class HidesPickles(Method):
    """Saves the same bytes as a tensor, which safetensors accepts."""

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return {"object": torch.tensor(list(PICKLED_ONE), dtype=torch.uint8)}, {}


class IntegerKeys(Method):
    """Keeps a table by stage number; JSON gives it back by text."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: dict[int, int] = {}

    def plan(self, stage: Stage) -> StagePlan:
        return StagePlan()

    def after_step(self, ctx: Context) -> None:
        self.seen[ctx.stage.index] = ctx.step

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return {}, {"seen": dict(self.seen)}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        self.seen = values["seen"]


class MutableOptions(Method):
    """Its options can be changed."""

    @dataclass(kw_only=True)
    class Options:
        """Options."""

        strength: float = 1.0
        """Of nothing."""


class NoHelp(Method):
    """Has an option that nobody explains."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options."""

        strength: float = 1.0


class MissingTensor(Method):
    """Ships a model without its embeddings."""

    def release(self, ctx: Context, weights: Weights) -> Weights:
        return {name: tensor for name, tensor in weights.items() if "embed" not in name}


class ReleasesInPlace(Method):
    """Releases by writing into the model that goes on training."""

    def release(self, ctx: Context, weights: Weights) -> Weights:
        with torch.no_grad():
            for _, parameter in ctx.parameters():
                parameter.mul_(0.99)
        return {name: tensor * 0.99 for name, tensor in weights.items()}


class NeverUsed(Method):
    """Declares past data for the looks of it."""

    needs = frozenset({Need.PAST_DATA})


class MeanPenalty(Method):
    """Adds a term that does not grow with the micro-batch, so it counts once for each of them."""

    def extra_loss(self, ctx: Context, batch: Batch, logits_BTV: torch.Tensor) -> torch.Tensor:
        return 1e3 * logits_BTV.pow(2).mean()


class ImpurePlan(Method):
    """Gives another plan every time it is asked."""

    calls = 0

    def plan(self, stage: Stage) -> StagePlan:
        self.calls += 1
        return StagePlan(optimizer="carry" if self.calls % 2 else "reset")


class ConstantSeed(Method):
    """Throws the trained weights away and puts constants in their place."""

    def after_step(self, ctx: Context) -> None:
        for _, parameter in ctx.parameters():
            parameter.data.fill_(0.01)


class LooksBehind(Method):
    """Reaches through the context to the engine's stream."""

    def after_step(self, ctx: Context) -> None:
        ctx.engine.stream.tokens("heldout", 3)  # type: ignore[attr-defined]


class Crashes(Method):
    """Has an ordinary bug in its second step."""

    def after_step(self, ctx: Context) -> None:
        if ctx.step == 1:
            raise KeyError("no such layer")


class KeepsOldState(Method):
    """Counts steps, acts on the count, and adds what it loads to what it has."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.steps = 0

    def after_step(self, ctx: Context) -> None:
        self.steps += 1
        for _, parameter in ctx.parameters():
            parameter.data.mul_(1 - 1e-5 * self.steps)

    def state_dict(self) -> tuple[Weights, dict[str, Any]]:
        return {}, {"steps": self.steps}

    def load_state_dict(self, tensors: Weights, values: dict[str, Any]) -> None:
        self.steps += values["steps"]


BUGS: dict[type[Method], tuple[set[str], str]] = {
    Forgets: ({"resume", "rewind"}, "state_dict"),
    KeepsOldState: ({"rewind"}, "overwrite all"),
    LiveAnchor: ({"state"}, "live parameter"),
    Undeclared: ({"needs"}, "base_weights without declaring it"),
    OwnCopy: ({"needs"}, r"ctx\.second_model"),
    Unbilled: ({"billing"}, "most in extra_loss, and billed 0 "),
    UnbilledBackward: ({"billing"}, "if a backward pass follows"),
    GlobalNoise: ({"random"}, r"edit_gradients, stage 1, step 0: torch"),
    HalfMixture: ({"plan"}, "do not sum to 1"),
    Pickles: ({"state"}, "pickled"),
    HidesPickles: ({"state"}, "pickled"),
    IntegerKeys: ({"state"}, "key 1"),
    MutableOptions: ({"options"}, "frozen=True"),
    NoHelp: ({"options"}, "option strength has no help"),
    MissingTensor: ({"release"}, "lacks model.embed_tokens.weight"),
    ReleasesInPlace: ({"release"}, "training weights"),
    NeverUsed: ({"needs"}, "declares PAST_DATA and never used it"),
    MeanPenalty: ({"accumulation"}, "not their mean"),
    ImpurePlan: ({"plan"}, "two plans"),
    ConstantSeed: ({"other_seed"}, "same run"),
    LooksBehind: ({"context"}, r"ctx\.engine"),
    Crashes: ({"runs"}, r"KeyError: 'no such layer' \[test_contract.py:\d+\]"),
}


@pytest.mark.parametrize("cls", BUGS, ids=lambda cls: cls.__name__)
def test_a_planted_bug_fails_the_check_that_is_about_it(lab: Lab, cls: type[Method]) -> None:
    checks, message = BUGS[cls]
    found = problems_of(of_method(lab, cls), METHOD_CHECKS)
    assert set(found) == checks, found
    assert all(re.search(message, text) and cls.__name__ in text for text in found.values()), found


# --- streams ---


def test_the_generated_stream_passes(clbench_home: Path) -> None:
    assert problems_of(StreamCase.of("tinydocs"), STREAM_CHECKS) == {}


class Small(StreamSource):
    """Forty short documents in each of two years."""

    name = "contract-small"
    heldout_fraction = 0.3

    def stages(self) -> list[StageInfo]:
        return [
            StageInfo(index=i, name=str(y), start=f"{y}-01-01", end=f"{y}-12-31") for i, y in enumerate((2001, 2002))
        ]

    def settings(self) -> dict[str, Any]:
        return {"version": 1}

    def documents(self, stage: int) -> Iterator[Document]:
        for i in range(40):
            words = " ".join(f"w{stage}x{i * j % 97}" for j in range(1, 30))
            yield Document(id=f"{stage}/{i}", text=words, date=f"{2001 + stage}-05-01", group="g", change="new")


class SameIds(Small):
    """Gives two documents one id."""

    def documents(self, stage: int) -> Iterator[Document]:
        documents = list(super().documents(stage))
        yield from [*documents, documents[3]]


class Fickle(Small):
    """Gives other text every time."""

    passes = 0

    def documents(self, stage: int) -> Iterator[Document]:
        type(self).passes += 1
        for document in super().documents(stage):
            yield Document(**{**vars(document), "text": f"{document.text} {self.passes}"})


class Apart(Small):
    """Has parts that leave a document out."""

    def n_parts(self, stage: int) -> int:
        return 2

    def part(self, stage: int, part: int) -> Iterator[Document]:
        documents = list(self.documents(stage))
        yield from documents[:20] if part == 0 else documents[21:]


class LateDownload(Small):
    """Uses the network after fetch(), and hides that it failed."""

    def documents(self, stage: int) -> Iterator[Document]:
        import socket

        with contextlib.suppress(OSError):
            socket.create_connection(("example.invalid", 443))
        yield from super().documents(stage)


class Overlapping(Small):
    """Has two stages of the same year."""

    def stages(self) -> list[StageInfo]:
        first, second = super().stages()
        return [first, StageInfo(index=1, name=second.name, start="2001-06-01", end=second.end)]


class Empty(Small):
    """Has text in every stage, but the same, so that no held-out document is left."""

    def documents(self, stage: int) -> Iterator[Document]:
        for document in super().documents(stage):
            yield Document(**{**vars(document), "text": "the same text in every document of this stream"})


@pytest.mark.parametrize(
    ("cls", "checks"),
    [
        (Small, set()),
        (SameIds, {"documents", "parts", "offline", "deterministic", "builds"}),
        (Fickle, {"parts", "deterministic"}),
        (Apart, {"parts"}),
        (LateDownload, {"offline"}),
        (Overlapping, {"stages"}),
        (Empty, {"builds"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_of_a_stream_is_found(
    clbench_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cls: type[StreamSource], checks: set[str]
) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path))
    assert set(problems_of(StreamCase(cls.__name__, cls), STREAM_CHECKS)) == checks


def test_an_order_that_hangs_on_the_hash_seed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_HOME", str(tmp_path / "home"))
    file = tmp_path / "set_order.py"
    file.write_text(
        "from clbench.streams.tinydocs import Tinydocs\n"
        "class SetOrder(Tinydocs):\n"
        "    '''Documents in the order of a set.'''\n"
        "    name = 'set-order'\n"
        "    def documents(self, stage):\n"
        "        by_id = {d.id: d for d in super().documents(stage)}\n"
        "        return iter([by_id[i] for i in set(by_id)])\n",
        encoding="utf-8",
    )
    found = problems_of(StreamCase.of(str(file)), STREAM_CHECKS)
    assert set(found) == {"deterministic"} and "another process" in found["deterministic"]


# --- suites ---


def test_the_heldout_suite_passes(lab: Lab) -> None:
    assert problems_of(SuiteCase.of(lab, "heldout"), SUITE_CHECKS) == {}


class Toy(Suite):
    """Measures the mean logit of one token."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options."""

        token: int = 5
        """The token."""

    name = "toy"

    def measure(self, checkpoint: Checkpoint) -> Rows:
        model: Any = checkpoint.model
        with torch.no_grad():
            value = float(model(input_ids=torch.tensor([[self.options.token]])).logits.mean())
        one = np.ones(1, np.int64)
        return Rows(
            item=["a"],
            stage=one,
            metric=["m"],
            value=np.array([value]),
            n_tokens=one,
            n_bytes=one,
            group=["g"],
            change=["new"],
        )


class Rude(Toy):
    """Leaves the model in evaluation mode."""

    def measure(self, checkpoint: Checkpoint) -> Rows:
        checkpoint.model.eval()
        return super().measure(checkpoint)


class Drawing(Toy):
    """Draws from the global generator and does not put it back."""

    def measure(self, checkpoint: Checkpoint) -> Rows:
        torch.rand(1)
        return super().measure(checkpoint)


class Drifting(Toy):
    """Gives other values every time."""

    calls = 0

    def measure(self, checkpoint: Checkpoint) -> Rows:
        type(self).calls += 1
        rows = super().measure(checkpoint)
        return Rows(**{**vars(rows), "value": rows.value + self.calls})


class SameDigest(Toy):
    """Has an option that changes values and not its address."""

    def sha256(self) -> str:
        return "0" * 64


class WrongStage(Toy):
    """Reports a stage that the stream does not have."""

    def measure(self, checkpoint: Checkpoint) -> Rows:
        return Rows(**{**vars(super().measure(checkpoint)), "stage": np.array([99])})


class Silent(Toy):
    """Gives NaN without a word."""

    def measure(self, checkpoint: Checkpoint) -> Rows:
        return Rows(**{**vars(super().measure(checkpoint)), "value": np.array([math.nan])})


class Undefined(Silent):
    """Gives NaN and says why."""

    def measure(self, checkpoint: Checkpoint) -> Rows:
        return Rows(**{**vars(super().measure(checkpoint)), "change": [f"{UNDEFINED}no base"]})


class Undocumented(Toy):
    """Has an option that nobody explains."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options."""

        token: int = 5


class BadlyNamed(Toy):
    """Has a name that is no part of a path."""

    name = "../toy"


@pytest.mark.parametrize(
    ("cls", "checks"),
    [
        (Toy, set()),
        (Undocumented, {"options"}),
        (BadlyNamed, {"options"}),
        (Rude, {"leaves"}),
        (Drawing, {"leaves"}),
        (Drifting, {"deterministic"}),
        (SameDigest, {"sha256"}),
        (WrongStage, {"rows"}),
        (Silent, {"rows"}),
        (Undefined, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_of_a_suite_is_found(lab: Lab, cls: type[Suite], checks: set[str]) -> None:
    make: Callable[[Any], Suite] = lambda options: cls(lab.stream, options)  # noqa: E731
    assert set(problems_of(SuiteCase(lab, cls.__name__, make), SUITE_CHECKS)) == checks


# --- as its users run it ---


def contract(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the suite as a user does, from a folder outside the checkout."""
    command = [sys.executable, "-m", "pytest", "-p", "clbench.contract.plugin", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "--pyargs", "clbench.contract", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_refuses_to_check_nothing_and_what_it_cannot_find(tmp_path: Path) -> None:
    nothing = contract(cwd=tmp_path)
    assert nothing.returncode == 4
    assert nothing.stderr.strip().startswith("ERROR: clbench.contract: nothing to check; say what")
    assert len(nothing.stderr.strip().splitlines()) == 1
    unknown = contract("--method", "repaly", cwd=tmp_path)
    assert unknown.returncode == 4
    assert "unknown method 'repaly'; did you mean 'replay'?" in unknown.stdout + unknown.stderr


@pytest.mark.slow
def test_it_runs_from_another_folder_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = check_*.py\nfilterwarnings = error\n", "utf-8")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom clbench.method import Method\n"
        "class Fine(Method):\n    '''Does nothing.'''\n"
        "class Noisy(Method):\n    '''Draws from the global generator.'''\n"
        "    def after_step(self, ctx):\n        torch.rand(1)\n",
        "utf-8",
    )
    done = contract("--method", "mine.py:Fine", "--method", "mine.py:Noisy", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    n = len(METHOD_CHECKS)
    assert f"1 failed, {2 * n - 1} passed" in done.stdout
    assert "FAILED" in done.stdout and "mine.py:Noisy-random" in done.stdout
    assert "draw from torch.Generator().manual_seed" in done.stdout
    assert "Traceback" not in done.stdout


def test_its_plugin_leaves_other_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--method')\n    parser.addoption('--suite')\n", "utf-8"
    )
    (tmp_path / "test_x.py").write_text(
        "import sys\ndef test_x(request):\n    assert request.config.getoption('method') == 'mine'\n"
        "    assert 'torch' not in sys.modules and 'clbench.registry' not in sys.modules\n",
        "utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "clbench.contract.plugin", "test_x.py", "--method", "mine"]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_problems_are_one_line(lab: Lab) -> None:
    found = problems_of(of_method(lab, Undeclared), METHOD_CHECKS)
    assert json.dumps(found).count("\\n") == 0
    assert found["needs"].endswith("(Undeclared); add Need.BASE_WEIGHTS to its needs")


def test_the_generated_stream_can_be_checked_from_its_class(clbench_home: Path) -> None:
    assert problems_of(StreamCase("tinydocs", Tinydocs), STREAM_CHECKS) == {}
