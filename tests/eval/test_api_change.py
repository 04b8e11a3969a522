from __future__ import annotations

import ast
import math
import re
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clbench import late, prepare, registry
from clbench.build import build_stream
from clbench.contract.lab import Lab
from clbench.contract.suites import SUITE_CHECKS, SuiteCase
from clbench.errors import ConfigError, IntegrityError, NotFoundError
from clbench.eval import api_change
from clbench.eval._api_changes import CHANGES, count_changes, signature_changes
from clbench.eval._api_facts import N_CANDIDATES, Fact, facts_of, read
from clbench.eval._api_questions import PREMISES, answer_text, prompt_of
from clbench.eval._api_signatures import Parameter, parse
from clbench.eval.api_change import ApiChange
from clbench.stream import Stream
from clbench.streams import _docstrings
from clbench.suite import Checkpoint, Rows
from clbench.train.models import make_model
from clbench.train.parallel import Hardware
from tests.api_releases import CORE, MOVED, write_manifest


@pytest.fixture(scope="module")
def stream(clbench_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """Three releases of one package, built as a user would."""
    manifest = write_manifest(tmp_path_factory.mktemp("releases"))
    return build_stream(registry.make_stream_source(f"codedocs:manifest={manifest}"), progress=False)


@pytest.fixture(scope="module")
def facts(stream: Stream) -> dict[str, Fact]:
    return {fact.item: fact for fact in ApiChange(stream, ApiChange.Options(per_package=99)).facts}


@pytest.fixture(scope="module")
def llama(stream: Stream) -> torch.nn.Module:
    spec = registry.load_track("tinydocs").model
    assert spec is not None
    model = make_model(spec, vocab_size=stream.vocab_size, eos_id=stream.eos_id, seed=0)
    with torch.no_grad():  # a fresh model is nearly uniform: spread its answers
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model


def checkpoint_of(model: torch.nn.Module) -> Checkpoint:
    return Checkpoint(model=model, weights_sha256="0" * 64, device=torch.device("cpu"), autocast_dtype=None)


# --- signatures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("()", "()"),
        ("(a, b=1,)", "(a, b=1)"),
        ("(self, x: int = 3, *args: str, y: dict[str, int], **kw) -> list[int]", "(self, x=3, *args, y, **kw)"),
        ("(a, /, b, *, c = 'x, y')", "(a, /, b, *, c='x, y')"),
        ("(a=f(b, c), d={'k': [1, 2]}, e=lambda x, y: x, g=1)", "(a=f(b, c), d={'k': [1, 2]}, e=lambda x, y: x, g=1)"),
        ("(a=(lambda x, y: x), b = u\"t\", c=b'\\'')", "(a=(lambda x, y: x), b='t', c=b'\\'')"),
        ("[T: int](x: T = 1 if a == 2 else 3) -> T", "(x=1 if a == 2 else 3)"),
        ("(x: Literal['=', ','] = '=')", "(x='=')"),
        ("(a, (b, c))", None),
        ("", None),
        ("(Base)", "(Base)"),
        ("(a", None),
    ],
)
def test_a_signature_is_read_without_annotations(text: str, expected: str | None) -> None:
    found = parse(text)
    assert (None if found is None else str(found)) == expected


def test_what_a_caller_gives() -> None:
    signature = parse("(self, a, /, *, b=1, **rest)")
    assert signature is not None
    assert signature.named == (Parameter("a"), Parameter("b", default="1"), Parameter("rest", "**"))
    plain = parse("(a, self)")
    assert plain is not None and len(plain.named) == 2


def test_signatures_are_those_of_ast_over_the_standard_library() -> None:
    """The rest of the library agrees as well; a default in which spaces or a one-tuple's comma count is set aside."""
    root, n = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(root.glob("[a-l]*.py")) + sorted(root.glob("asyncio/*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        expected: dict[str, list[ast.arguments]] = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                expected.setdefault(node.name, []).append(node.args)
        for item in _docstrings.definitions(source):
            if item.kind == "def" and len(expected.get(item.name, [])) == 1:
                found = parse(item.signature)
                assert found is not None, (path, item.name)
                texts = [
                    (p.stars + p.name, p.default and ast.unparse(ast.parse(p.default, mode="eval")))
                    for p in found.parameters
                ]
                if "(object()" not in item.signature:
                    assert texts == list(of_ast(expected[item.name][0])), (path, item.name)
                    n += 1
    assert n > 2000


def of_ast(arguments: ast.arguments) -> Any:
    """Yield what ``parse`` should read, from Python's own parser."""
    first = arguments.posonlyargs + arguments.args
    defaults: list[Any] = [None] * (len(first) - len(arguments.defaults)) + arguments.defaults
    for i, (one, default) in enumerate(zip(first, defaults, strict=True)):
        yield one.arg, default and ast.unparse(default)
        if i + 1 == len(arguments.posonlyargs):
            yield "/", None
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}", None
    elif arguments.kwonlyargs:
        yield "*", None
    for one, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield one.arg, keyword and ast.unparse(keyword)
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}", None


# --- changes


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("(a, b)", "(a, b, c=1)", ["parameter added"]),
        ("(self, a, b)", "(self, a)", ["parameter removed"]),
        ("(a, depth=1)", "(a, level=1)", ["parameter renamed"]),
        ("(a, depth=1)", "(a, level=2)", ["parameter removed", "parameter added"]),
        ("(a, b=1)", "(a, b=2)", ["default changed"]),
        ("(a, b)", "(b, a)", ["parameters reordered"]),
        ("(a, b)", "(a: int, b: str) -> None", []),
        ("(a, **kw)", "(a, kw)", ["parameter removed", "parameter added"]),
    ],
)
def test_changes_of_a_signature(old: str, new: str, changes: list[str]) -> None:
    first, second = parse(old), parse(new)
    assert first is not None and second is not None
    assert list(signature_changes(first, second)) == changes and set(changes) <= set(CHANGES)


def test_changes_between_releases_are_counted(stream: Stream) -> None:
    packages = ApiChange(stream).packages
    assert count_changes(packages) == {
        1: Counter(
            {
                "parameter added": 1,  # connect
                "default changed": 2,  # shade, and 1 -> 1.0 of count, which is no fact
                "parameter renamed": 1,  # walk
                "moved": 1,
                "deprecated": 1,
                "removed": 1,
            }
        ),
        2: Counter({"default changed": 2, "removed": 1, "added": 1}),
    }


# --- facts


@pytest.mark.parametrize(
    ("item", "values", "kinds"),
    [
        ("core.connect/signature", ["(a, b)", "(a, b, weight=1)", "(a, b, weight=1)"], "new updated kept"),
        ("core.connect/parameter/3", ["none", "weight", "weight"], "new updated kept"),
        ("core.shade/default/mode", ["'light'", "'dark'", "'light'"], "new updated reverted"),
        ("core.walk/parameter/1", ["start", "root", "root"], "new updated kept"),
        ("core.old/status", ["available", "deprecated", "removed"], "new updated obsolete"),
        ("core.gone/status", ["available", "removed", "removed"], "new obsolete obsolete"),
        ("core.gone/default/size", ["3"], "new"),
        ("moves.born/signature", [None, None, "(y, z=None)"], "new"),
    ],
)
def test_truths_and_what_befell_them(facts: dict[str, Fact], item: str, values: list[str | None], kinds: str) -> None:
    fact = facts[f"graphs/graphs.{item}"]
    assert fact.values == {stage: value for stage, value in enumerate(values) if value is not None}
    assert list(fact.kinds.values()) == kinds.split()


def test_what_moved_is_a_fact_about_its_module_and_none_about_its_status(facts: dict[str, Fact]) -> None:
    fact = facts["graphs/relocate/module"]
    assert list(fact.values.values()) == ["graphs.core", "graphs.moves", "graphs.moves"]
    assert fact.documents == {
        0: "graphs:graphs/core.py:relocate", 1: "graphs:graphs/moves.py:relocate", 2: "graphs:graphs/moves.py:relocate",
    }  # fmt: skip
    assert "graphs/graphs.core.relocate/status" not in facts


def test_another_way_to_write_a_number_is_no_change(facts: dict[str, Fact]) -> None:
    assert "graphs/graphs.core.count/default/n" not in facts


def test_candidates_hold_every_truth_and_what_is_true_of_others(facts: dict[str, Fact]) -> None:
    for fact in facts.values():
        assert set(fact.values.values()) <= set(fact.candidates) and len(set(fact.candidates)) == len(fact.candidates)
        assert len(fact.candidates) == (3 if fact.attribute == "status" else N_CANDIDATES)
    module = facts["graphs/relocate/module"].candidates
    assert module == ("graphs.core", "graphs.far.away", "graphs.fillers", "graphs.moves")
    known = {f"({one})" for release in (*CORE, *MOVED) for one in release.values()}
    others = set(facts["graphs/graphs.core.connect/signature"].candidates) - known
    assert all(re.fullmatch(r"\(value_\d+, limit_\d=\d\)", one) for one in others)


def test_fewer_facts_are_a_part_of_more(stream: Stream, facts: dict[str, Fact]) -> None:
    packages = ApiChange(stream).packages
    few = facts_of(packages, per_package=2)
    assert {fact.item for fact in few} < set(facts) and few == facts_of(packages, per_package=2)
    counts = Counter((fact.attribute, fact.changes) for fact in few)
    assert all(n <= (2 if changing else 1) for (_, changing), n in counts.items())
    assert counts["status", True] == 2 and counts["default", False] == 1


def test_what_is_asked(facts: dict[str, Fact]) -> None:
    def prompts(item: str) -> tuple[str, str]:
        fact = facts[f"graphs/{item}"]
        return prompt_of(fact, None), prompt_of(fact, fact.releases[1])

    assert prompts("graphs.core.connect/signature") == (
        "def graphs.core.connect", "# graphs 2.0 (2012)\ndef graphs.core.connect",
    )  # fmt: skip
    assert prompts("graphs.core.connect/parameter/3") == (
        "the parameters of graphs.core.connect are `a`, `b`, then",
        "In graphs 2.0 (2012): the parameters of graphs.core.connect are `a`, `b`, then",
    )
    assert prompts("graphs.core.walk/parameter/1")[0] == "the first parameter of graphs.core.walk is"
    assert prompts("graphs.core.shade/default/mode")[1] == (
        "In graphs 2.0 (2012): the default value of parameter `mode` of graphs.core.shade is"
    )
    assert prompts("relocate/module")[0] == "the function relocate of graphs is defined in module"
    assert prompts("graphs.core.old/status")[1] == "In graphs 2.0 (2012): the function graphs.core.old is"


def test_broken_signatures_are_refused() -> None:
    for content in (b"", b"{}", b'{"format": 2, "stages": [], "releases": []}', b"\xff"):
        with pytest.raises(IntegrityError, match="signatures cannot be read"):
            read(content)


# --- measuring


def values_of(rows: Rows, metric: str) -> dict[tuple[str, int], float]:
    cells = zip(rows.item, rows.stage.tolist(), rows.metric, rows.value.tolist(), strict=True)
    return {(item, stage): value for item, stage, name, value in cells if name == metric}


def slow_nats(model: torch.nn.Module, tokenizer: Any, prompt: str, answer: str) -> float:
    """The log-likelihood of an answer, one text and one forward pass: the reference."""
    start = [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    whole = [tokenizer.eos_token_id, *tokenizer.encode(prompt + answer, add_special_tokens=False)]
    assert whole[: len(start)] == start
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(float(log_p[place - 1, whole[place]]) for place in range(len(start), len(whole)))


def test_rows_agree_with_a_slow_reference(stream: Stream, llama: torch.nn.Module) -> None:
    suite = ApiChange(stream, ApiChange.Options(per_package=2))
    rows = suite.measure(checkpoint_of(llama))
    tokenizer = AutoTokenizer.from_pretrained(stream.tokenizer_folder)
    n = 0
    for fact in suite.facts:
        texts = [answer_text(fact, answer) for answer in fact.candidates]
        premise = [slow_nats(llama, tokenizer, PREMISES[fact.attribute], text) for text in texts]
        for stage, truth in fact.values.items():
            place, key = fact.candidates.index(truth), (fact.item, stage)
            older = {fact.values[s] for s in fact.values if s < stage} - {truth}
            for form, release in (("plain", None), ("dated", fact.releases[stage])):
                nats = [slow_nats(llama, tokenizer, prompt_of(fact, release), text) for text in texts]
                total = math.log(sum(math.exp(one) for one in nats))
                assert values_of(rows, f"choice_nats:{form}")[key] == pytest.approx(total - nats[place], abs=1e-3)
                rules = {
                    "": nats,
                    "_norm": [one / len(text.encode()) for one, text in zip(nats, texts, strict=True)],
                    "_pmi": [one - before for one, before in zip(nats, premise, strict=True)],
                }
                for ending, scores in rules.items():
                    first, second = sorted(scores, reverse=True)[:2]
                    if first - second > 1e-3:  # closer ones may differ by rounding
                        answer = fact.candidates[int(np.argmax(scores))]
                        assert values_of(rows, f"acc{ending}:{form}")[key] == float(answer == truth)
                        assert values_of(rows, f"outdated{ending}:{form}")[key] == float(answer in older)
                        n += 1
            assert values_of(rows, "chance")[key] == 1 / len(fact.candidates)
            assert values_of(rows, "chance_outdated")[key] == len(older) / len(fact.candidates)
    assert n > 50


def test_a_model_of_the_first_release_is_right_then_and_stale_later(stream: Stream) -> None:
    suite = ApiChange(stream)
    scores = []
    for place, about, _ in suite.asked:
        fact = suite.facts[place]
        oldest = fact.values[min(fact.values)]
        like = [0.0 if about == api_change.PREMISE or answer != oldest else 50.0 for answer in fact.candidates]
        scores.append(np.array(like) - 60.0)
    rows = suite._rows(scores)
    for fact in suite.facts:
        first = min(fact.values)
        for stage, truth in fact.values.items():
            right = truth == fact.values[first]
            for form in ("plain", "dated"):
                assert values_of(rows, f"acc:{form}")[fact.item, stage] == float(right)
                assert values_of(rows, f"acc_pmi:{form}")[fact.item, stage] == float(right)
                assert values_of(rows, f"outdated:{form}")[fact.item, stage] == float(not right)


def test_ties_share_the_answer(stream: Stream) -> None:
    suite = ApiChange(stream)
    rows = suite._rows([np.full(len(suite.facts[place].candidates), -7.0) for place, _, _ in suite.asked])
    assert values_of(rows, "acc:plain") == values_of(rows, "chance")
    assert values_of(rows, "outdated:dated") == pytest.approx(values_of(rows, "chance_outdated"))


def test_groups_say_what_trained(stream: Stream) -> None:
    suite = ApiChange(stream)
    trained = {i for s in range(3) for i in stream.documents("train", s, ["id"])["id"].to_pylist()}
    heldout = {i for s in range(3) for i in stream.documents("heldout", s, ["id"])["id"].to_pylist()}
    seen: Counter[str] = Counter()
    for fact, group in zip(suite.facts, suite.groups, strict=True):
        attribute, split = group.split(", ")
        documents = {one for one in fact.documents.values() if one is not None}
        assert attribute == fact.attribute and documents
        assert bool(documents & trained) == (split == "trained") and (split == "trained" or documents <= heldout)
        seen[split] += 1
    assert min(seen["trained"], seen["heldout"]) > 0


def test_counts_are_told(stream: Stream) -> None:
    told = ApiChange(stream, ApiChange.Options(per_package=99)).summary()
    assert told["n_facts"] == sum(told["groups"].values())
    assert told["kinds"]["2008"].keys() == {"new"} and told["kinds"]["2020"]["reverted"] == 2
    assert told["changes"]["2020"] == {"default changed": 2, "removed": 1, "added": 1}


# --- the suite's promises and its errors


@pytest.mark.parametrize("check", SUITE_CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Any, stream: Stream, llama: torch.nn.Module, tmp_path: Path) -> None:
    lab = Lab(tmp_path, registry.load_track("tinydocs"), stream, Hardware(torch.device("cpu"), "fp32"), llama)

    def make(options: Any) -> ApiChange:
        return ApiChange(stream, options or ApiChange.Options(per_package=2))

    check(SuiteCase(lab, "api_change", make))


def test_a_stream_without_releases_is_refused(tinydocs: Stream, llama: torch.nn.Module) -> None:
    with pytest.raises(NotFoundError, match=r"stream 'tinydocs' has no api\.jsonl"):
        ApiChange(tinydocs).measure(checkpoint_of(llama))


def test_a_rearranged_stream_is_refused(stream: Stream) -> None:
    recipe = stream.manifest["recipe"]
    target = f"codedocs:manifest={recipe['options']['manifest']}"
    source = registry.load_class("streams", "shuffled")(registry.load_class("streams", "shuffled").Options(of=target))
    shuffled = build_stream(source, progress=False)
    with pytest.raises(NotFoundError, match="shuffled"):
        ApiChange(shuffled).data_sha256()


def test_options_are_checked(stream: Stream) -> None:
    with pytest.raises(ConfigError, match="per_package must be at least 1, not 0"):
        ApiChange(stream, ApiChange.Options(per_package=0))
    assert ApiChange(stream).sha256() != ApiChange(stream, ApiChange.Options(per_package=3)).sha256()
    assert ApiChange(stream).sha256() == ApiChange(stream, ApiChange.Options(tokens_per_batch=9)).sha256()


def test_a_tokenizer_that_tells_no_answers_apart_is_refused(stream: Stream, llama: torch.nn.Module) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    blind = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    with pytest.raises(ConfigError, match=r"does not tell the answers to .* apart"):
        ApiChange(stream).measure(replace(checkpoint_of(llama), tokenizer=blind))


def test_prepare_makes_the_questions_of_a_named_stream(stream: Stream, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = stream.manifest["recipe"]["options"]["manifest"]
    made = prepare.prepare(f"suite:api_change:stream=codedocs:manifest={manifest}")
    told = next(iter(made["suites"].values()))
    assert told["stream"] == "graphs" and told["n_facts"] == len(ApiChange(stream).facts)
    assert Path(told["file"]).is_file() and late.late_extra(stream, "api.jsonl")
    with pytest.raises(NotFoundError, match="tinydocs"):
        prepare.prepare("suite:api_change:stream=tinydocs")
