"""Suite ``capacity``: what a checkpoint represents, how its weights and units stand, how its losses moved, by period.

Probe text is the same for every checkpoint: of each period the held-out documents in the order of a hash of their ids,
cut to ``max_length`` tokens, until there are ``n_vectors`` positions. A sample is one position; the first ``skip`` of a
row are left out, as models keep vectors of huge length there. Period ``UNDATED`` is all periods together.

Shards: ``activations`` is one forward pass with hooks (representation, units, changes of token losses), ``weights``
needs no pass, ``gradients`` is optional and takes backward passes. The estimators stand in ``clbench.capacity``, names
and meaning of every row in docs/capacity-figures.md.

Memory beyond the model: one [d, d] matrix in float64 a layer, or three with a base, twice (this period's and the sum
of all), the hidden states of one batch, and the base's weights where there is a base. ``previous`` is loaded before the
base and freed. Letters in names: W rows of a batch, T positions, P sampled positions, D width, F units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.capacity import gradients, interference, similarity, spectra, units, weights
from clbench.capacity.figure import Figure, undefined
from clbench.errors import ConfigError, NonFiniteError
from clbench.eval._forward import (
    TOKENS_PER_BATCH,
    batches,
    head_is_all,
    precision,
    progress,
    undisturbed,
    vocabulary_size,
)
from clbench.eval._windows import Windows, pad_windows, short_input, token_nats
from clbench.eval.heldout import Corpus, read_corpus
from clbench.files import digest_of
from clbench.stream import Stream
from clbench.suite import UNDATED, UNDEFINED, Checkpoint, Reference, Rows, Suite

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
WHERE = "suite capacity"
POSITIONS = ("first", "middle", "last", "final")
"""Layers by position: output of the first, the middle and the last block, and what comes after the final norm."""
MAX_LENGTH = 128
"""Tokens of a row, as in the language-model geometry code for small models."""
LEAST_VECTORS = 2048
"""Samples below which debiased CKA is noisy."""
PER_WIDTH = 4
"""Samples a dimension below which ranks measure the sample."""
NO_BASE = undefined("the checkpoint has no base to compare with")
NO_PREVIOUS = undefined("the checkpoint has no previous one to compare with")


class Capacity(Suite):
    """Ranks, decay and similarity of representations, dormant units, weights and their drift, interference of losses.

    Raises (``measure``):
        ConfigError: no such layer, fewer positions than ``max_length``, or no text that is long enough.
        NonFiniteError: hidden states or losses are not finite.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """All of them decide the values, but for ``tokens_per_batch``."""

        layers: str = "first+middle+last+final"
        """Layers whose outputs are measured, joined by +: first, middle, last, final (after the norm), or numbers of
        blocks from 0."""
        n_vectors: int | None = None
        """Positions of a period; 2048 when not given, or four times the width where that is more."""
        max_length: int | None = None
        """Tokens of a document that are read; 128 when not given, or the model's positions where these are fewer."""
        skip: int = 10
        """First positions of a row that are no samples."""
        least_ratio: float = 4.0
        """Samples a dimension below which ranks and Procrustes distances are NaN."""
        gradients: bool = False
        """Also measure gradients: two backward passes a period and row, see docs/capacity-figures.md."""
        gradient_rows: int = 32
        """Documents of a period whose gradients are taken."""
        seed: int = 0
        """Of the choice of documents and of resamples."""
        tokens_per_batch: int | None = None
        """Positions in one forward pass; chosen by device when not given. Less needs less memory."""

    name = "capacity"
    version = 1
    compares = True
    options: Options

    def __init__(self, stream: Stream, options: Options | None = None) -> None:
        super().__init__(stream, options)
        self._check_options()
        self._kept: tuple[Any, int, int, _Probe] | None = None

    def _check_options(self) -> None:
        o = self.options
        for name, least in (("n_vectors", 4), ("max_length", 2), ("skip", 0), ("gradient_rows", 2)):
            value = getattr(o, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}", where=WHERE)
        if o.tokens_per_batch is not None and o.tokens_per_batch < 1:
            raise ConfigError(f"tokens_per_batch must be at least 1, not {o.tokens_per_batch}", where=WHERE)
        if o.least_ratio < 0:
            raise ConfigError(f"least_ratio must not be negative, is {o.least_ratio}", where=WHERE)
        wrong = [name for name in o.layers.split("+") if name not in POSITIONS and not name.isdecimal()]
        if wrong or not o.layers:
            raise ConfigError(
                f"no layer is called {wrong[0] if wrong else ''!r}",
                where=WHERE,
                mend=f"join {', '.join(POSITIONS)} or numbers of blocks by +",
            )

    def sha256(self) -> str:
        """Return the digest of name, version and options; ``tokens_per_batch`` moves values by rounding only."""
        options = asdict(self.options)
        del options["tokens_per_batch"]
        return digest_of({"name": self.name, "version": self.version, "options": options})

    def shards(self) -> list[str]:
        """Return the parts, in the order of their rows."""
        return ["activations", "weights"] + (["gradients"] if self.options.gradients else [])

    def measure(self, checkpoint: Checkpoint) -> Rows:
        """Return the rows of all parts."""
        return Rows.joined([self.measure_shard(checkpoint, shard) for shard in self.shards()])

    def measure_shard(self, checkpoint: Checkpoint, shard: str) -> Rows:
        """Return the rows of one part: one a figure, layer and period."""
        part: Callable[[Checkpoint], Rows] = getattr(self, f"_{shard}")
        return part(checkpoint)

    def shard_flops(self, checkpoint: Checkpoint, shard: str) -> float:
        """Return the operations of the forward and backward passes; spectra and norms are left out."""
        if shard == "weights":
            return 0.0
        probe = self._probe(checkpoint)
        lengths = probe.gradient_lengths if shard == "gradients" else probe.lengths
        forward = _forward_flops(checkpoint.model, lengths)
        others = {r.weights_sha256 for r in (checkpoint.base, checkpoint.previous) if r is not None}
        others.discard(checkpoint.weights_sha256)
        if shard == "activations":
            return forward * (1 + len(others))
        previous = checkpoint.previous is not None and checkpoint.previous.weights_sha256 in others
        return forward * (3 + (4 if previous else 0))  # a backward pass is two forward ones

    def flops(self, checkpoint: Checkpoint) -> float:
        """Return the operations of all parts."""
        return sum(self.shard_flops(checkpoint, shard) for shard in self.shards())

    def _probe(self, checkpoint: Checkpoint) -> _Probe:
        """Return the text; it is kept, as every checkpoint of a run is measured on the same."""
        config = checkpoint.model.config.get_text_config()  # type: ignore[union-attr,operator]
        width, length = int(config.hidden_size), _length(checkpoint.model, self.options)
        kept = self._kept
        if kept is None or kept[0] is not checkpoint.tokenizer or kept[1:3] != (width, length):
            n = self.options.n_vectors or max(LEAST_VECTORS, PER_WIDTH * width)
            probe = choose_probe(self.stream, checkpoint.tokenizer, n, length, self.options)
            self._kept = kept = (checkpoint.tokenizer, width, length, probe)
        _check_vocabulary(checkpoint.model, kept[3])
        return kept[3]

    # --- parts

    def _activations(self, checkpoint: Checkpoint) -> Rows:
        import torch

        probe, table, ratio = self._probe(checkpoint), _Table(), self.options.least_ratio
        layers = choose_layers(checkpoint.model, self.options.layers)
        with torch.no_grad(), precision(checkpoint):
            earlier, not_earlier = self._earlier_nats(checkpoint, probe)
            shifts: Shifts = {}
            whole: _Collected | None = None
            with ExitStack() as stack:
                base, not_base = stack.enter_context(_opened(checkpoint.base, checkpoint, NO_BASE))
                ours = _Runner(checkpoint.model, layers, checkpoint.device, self._batch_size(checkpoint), stack)
                theirs = None
                if base is not None and base is not checkpoint.model:
                    theirs = _Runner(base, layers, checkpoint.device, self._batch_size(checkpoint), stack)
                advance = stack.enter_context(progress(WHERE, sum(len(w.tokens) for w in probe.windows)))
                for place, (stage, windows) in enumerate(zip(probe.stages, probe.windows, strict=True)):
                    one = _collect(windows, ours, theirs, shifts, compare=base is not None, advance=advance)
                    table.add_activations(stage, one, not_base, ratio)
                    before = None if earlier is None else earlier[place]
                    table.add_changes(stage, "base", one.nats, one.base_nats, windows, not_base, self.options.seed)
                    table.add_changes(stage, "previous", one.nats, before, windows, not_earlier, self.options.seed)
                    whole = one if whole is None else whole + one
            if whole is not None and len(probe.stages) > 1:
                table.add_activations(UNDATED, whole, not_base, ratio)
        return table.rows()

    def _earlier_nats(self, checkpoint: Checkpoint, probe: _Probe) -> tuple[list[Floats] | None, Figure | None]:
        """Return the previous checkpoint's losses of every sample, period by period, or why there are none."""
        with ExitStack() as stack:
            model, why = stack.enter_context(_opened(checkpoint.previous, checkpoint, NO_PREVIOUS))
            if model is None:
                return None, why
            runner = _Runner(model, {}, checkpoint.device, self._batch_size(checkpoint), stack)
            return [np.concatenate([nats for _, nats, _ in runner.run(w)]) for w in probe.windows], None

    def _batch_size(self, checkpoint: Checkpoint) -> int:
        return self.options.tokens_per_batch or TOKENS_PER_BATCH.get(checkpoint.device.type, TOKENS_PER_BATCH["cuda"])

    def _weights(self, checkpoint: Checkpoint) -> Rows:
        import torch

        table = _Table()
        with torch.no_grad(), _opened(checkpoint.base, checkpoint, NO_BASE) as (base, not_base):
            theirs = {} if base is None else dict(base.named_parameters())
            sizes: dict[str, weights.Size] = {}
            kinds: dict[str, list[tuple[float, float]]] = {}
            for name, p in checkpoint.model.named_parameters():
                size = weights.size_of(p, theirs.get(name))
                for part in parts_of(name):
                    sizes[part] = sizes.get(part, weights.Size()) + size
                if p.ndim >= 2:
                    matrix = name.removesuffix(".weight")
                    norm = weights.spectral_norm(p)
                    rank = weights.stable_rank(size, norm)
                    table.add(matrix, UNDATED, "spectral_norm", Figure(norm), p.numel(), "weights")
                    table.add(matrix, UNDATED, "stable_rank", rank, p.numel(), "weights")
                    kinds.setdefault(matrix.rpartition(".")[2], []).append((norm, rank.value))
        for part, size in sizes.items():
            table.add_size(part, size, sizes["all"], not_base)
        for kind, found in kinds.items():
            norms, ranks = np.array(found).T
            table.add(kind, UNDATED, "mean_spectral_norm", Figure(float(norms.mean())), len(found), "weights")
            known = ranks[np.isfinite(ranks)]
            mean = Figure(float(known.mean())) if len(known) else undefined("all matrices are zero")
            table.add(kind, UNDATED, "mean_stable_rank", mean, len(found), "weights")
        return table.rows()

    def _gradients(self, checkpoint: Checkpoint) -> Rows:
        probe, table, device = self._probe(checkpoint), _Table(), checkpoint.device
        size = self._batch_size(checkpoint)
        halves = gradients.Halves.for_model(checkpoint.model, len(probe.stages), seed=self.options.seed)
        names = {stage: f"period {stage}" for stage in probe.stages}
        with undisturbed(checkpoint.model, device):
            for (stage, half), chosen in probe.halves.items():
                batches_of_half = _gradient_batches(chosen, size, device)
                gradient, lengths = gradients.mean_gradient(checkpoint.model, batches_of_half)
                halves.add(stage, half, gradient)
                table.add_lengths(stage, half, lengths, halves.norms[stage, half])
                del gradient
        gram_TT = halves.gram(probe.stages)
        for i, stage in enumerate(probe.stages):
            n = sum(len(probe.halves[stage, half].tokens) for half in gradients.HALVES)
            table.add(names[stage], stage, "gradient_norm", gradients.length(gram_TT[i, i]), n, "gradients")
            for j, other in enumerate(probe.stages):
                table.add(names[other], stage, "gradient_dot", Figure(float(gram_TT[i, j])), n, "gradients")
                table.add(names[other], stage, "gradient_cosine", gradients.cosine(gram_TT, i, j), n, "gradients")
        self._increments(checkpoint, probe, table, size)
        return table.rows()

    def _increments(self, checkpoint: Checkpoint, probe: _Probe, table: _Table, size: int) -> None:
        """Add how much of the losses' changes since the previous checkpoint is of first order, period by period."""
        with _opened(checkpoint.previous, checkpoint, NO_PREVIOUS) as (before, why):
            step = None if before is None else gradients.step_between(before, checkpoint.model)
            for stage in probe.stages:
                rows = [probe.halves[stage, half] for half in gradients.HALVES]
                n = sum(len(one.tokens) for one in rows)
                if before is None or step is None:
                    table.add_increment(stage, why or NO_PREVIOUS, n)
                    continue
                chosen = [batch for one in rows for batch in _gradient_batches(one, size, checkpoint.device)]
                with undisturbed(checkpoint.model, checkpoint.device):
                    table.add_increment(stage, gradients.increment(before, checkpoint.model, chosen, step=step), n)


# --- text


@dataclass(frozen=True)
class _Probe:
    """The text of every period: windows whose scored positions are the samples, in the order that was chosen."""

    stages: list[int]
    windows: list[Windows]
    halves: dict[tuple[int, str], Windows]
    """(period, half) -> rows whose gradients are taken; all their positions but the skipped ones count."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Inputs of every row."""
        return np.concatenate([w.n_input for w in self.windows])

    @property
    def gradient_lengths(self) -> NDArray[np.int64]:
        """Inputs of every row whose gradient is taken."""
        return np.concatenate([w.n_input for w in self.halves.values()])


def choose_probe(stream: Stream, tokenizer: Any, n_vectors: int, length: int, options: Capacity.Options) -> _Probe:
    """Choose the text of every period, rows of at most ``length`` tokens.

    Raises:
        ConfigError: a period has no document that is long enough.
    """
    corpus = read_corpus(stream, tokenizer)
    probe = _Probe([info.index for info in stream.stages()], [], {})
    for info in stream.stages():
        order = _in_order(corpus, info.index, options)
        if not order:
            raise ConfigError(
                f"no held-out document of {info.name} has more than {options.skip} tokens",
                where=WHERE,
                mend="lower skip, or leave the period out of the stream",
            )
        probe.windows.append(_rows_of(corpus, [index for index, _ in order], n_vectors, length, options.skip))
        for place, half in enumerate(gradients.HALVES):
            # A document stands in the same half wherever it stands: halves never share one.
            mine = [index for index, key in order if key[-1] % 2 == place] or [index for index, _ in order]
            chosen = mine[: options.gradient_rows // 2]
            probe.halves[info.index, half] = _rows_of(corpus, chosen, length * len(chosen), length, options.skip)
    return probe


def _in_order(corpus: Corpus, stage: int, options: Capacity.Options) -> list[tuple[int, bytes]]:
    """Return the documents of a period that are long enough, with the hash that orders them."""
    found = []
    for index in np.flatnonzero(corpus.stage == stage):
        if len(corpus.tokens[index]) > options.skip:
            text = f"{options.seed}\x1f{corpus.item[index]}"
            found.append((int(index), hashlib.sha256(text.encode()).digest()))
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def _rows_of(corpus: Corpus, chosen: Sequence[int], n_vectors: int, length: int, skip: int) -> Windows:
    """Cut documents to rows, a row each, until there are so many samples; the last row is cut to fit."""
    tokens: list[NDArray[np.int32]] = []
    left = n_vectors
    for index in chosen:
        ids = corpus.tokens[index][: min(length, skip + left)]
        tokens.append(np.concatenate([np.array([corpus.prefix_id], dtype=np.int32), ids.astype(np.int32)]))
        left -= len(ids) - skip
        if left <= 0:
            break
    places = np.arange(len(tokens))
    n_input = np.array([len(t) - 1 for t in tokens], dtype=np.int64)
    return Windows(document=places, unique_of=places, tokens=tokens, n_input=n_input, n_scored=n_input - skip)


def _length(model: Any, options: Capacity.Options) -> int:
    """Return the tokens of a row.

    Raises:
        ConfigError: the model has fewer positions, or all of them are skipped.
    """
    has = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = options.max_length or min(MAX_LENGTH, has or MAX_LENGTH)
    if has is not None and length > has:
        raise ConfigError(
            f"max_length {length} is more than the model's {has} positions", where=WHERE, mend=f"choose at most {has}"
        )
    if options.skip >= length:
        raise ConfigError(f"skip {options.skip} leaves nothing of {length} positions", where=WHERE, mend="lower it")
    return length


def _check_vocabulary(model: Any, probe: _Probe) -> None:
    """Refuse token ids that the model has no embedding for."""
    highest = max(int(t.max()) for windows in probe.windows for t in windows.tokens)
    if highest >= vocabulary_size(model):
        raise ConfigError(
            f"token id {highest} is beyond the model's vocabulary of {vocabulary_size(model)}",
            where=WHERE,
            mend="give the checkpoint the tokenizer that it was trained with",
        )


# --- the model and what is watched in it


def blocks_of(model: Any) -> list[Any]:
    """Return the blocks of a decoder, in order.

    Raises:
        ConfigError: they are not found.
    """
    import torch

    n = int(model.config.get_text_config().num_hidden_layers)
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    found = next(lists, None)
    if found is None:
        raise ConfigError(f"no list of {n} blocks is found in the model", where=type(model).__name__)
    return list(found)


def choose_layers(model: Any, spec: str) -> dict[str, int | None]:
    """Return layer name -> number of its block, None for what comes after the final norm; a block stands once.

    Raises:
        ConfigError: the model has fewer blocks.
    """
    n = len(blocks_of(model))
    numbers = {"first": 0, "middle": (n - 1) // 2, "last": n - 1}
    found: dict[str, int | None] = {}
    for name in spec.split("+"):
        block = None if name == "final" else numbers[name] if name in numbers else int(name)
        if block is not None and block >= n:
            raise ConfigError(f"there is no block {block}", where=WHERE, mend=f"the model has blocks 0 to {n - 1}")
        if block not in found.values():
            found[f"block {block}" if name.isdecimal() else name] = block
    return found


Batch = tuple[NDArray[np.int64], Floats, dict[str, "torch.Tensor"]]
"""Rows of a batch, losses of their samples in nats, ``[P]``, and the samples' vectors by layer, ``[P, D]``."""


class _Runner:
    """A model with hooks, run over windows batch by batch; hooks and all else are undone by the stack."""

    def __init__(
        self, model: Any, layers: dict[str, int | None], device: torch.device, tokens_per_batch: int, stack: ExitStack
    ) -> None:
        stack.enter_context(undisturbed(model, device))
        self.model, self.device, self.size = model, device, tokens_per_batch
        self.fast: bool | None = None
        self.hidden: dict[str, torch.Tensor] = {}
        self.activity: dict[str, units.Activity] = {}
        self.place_P: torch.Tensor | None = None
        """None: nothing is watched."""
        blocks = blocks_of(model) if layers else []
        for name, block in layers.items():
            module = model.base_model if block is None else blocks[block]
            stack.enter_context(_hooked(module.register_forward_hook(self._note(name))))
        for number, module in enumerate(units.output_layers(model).values() if layers else ()):
            stack.enter_context(_hooked(module.register_forward_pre_hook(self._count(f"block {number}"))))

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.place_P is not None:
                hidden = getattr(output, "last_hidden_state", output)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                self.hidden[name] = hidden.flatten(0, 1).index_select(0, self.place_P)

        return hook

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            if self.place_P is not None:
                h = args[0]
                seen = self.activity.setdefault(name, units.Activity(h.shape[-1]))
                seen.add(h.reshape(-1, h.shape[-1]).index_select(0, self.place_P))

        return hook

    def head_is_all(self, windows: Windows) -> bool:
        """Say whether losses follow from hidden states and head alone; tried once."""
        if self.fast is None:
            self.fast = head_is_all(self.model, short_input(windows, self.device))
        return self.fast

    def run(self, windows: Windows) -> Iterator[Batch]:
        """Yield every batch of some windows, longest first; ``activity`` is of these windows afterwards."""
        self.activity = {}
        size = self.size if self.head_is_all(windows) else min(self.size, max(1, 2**26 // vocabulary_size(self.model)))
        for rows in batches(windows.n_input, size, self.device):
            batch = pad_windows(windows, rows, self.device)
            self.place_P = batch.place_P
            try:
                nats = token_nats(self.model, batch, fast=self.head_is_all(windows)).double().cpu().numpy()
            finally:
                self.place_P = None
            if not np.isfinite(nats).all():
                raise NonFiniteError(
                    "a token's loss is not finite",
                    where=WHERE,
                    mend="look at the checkpoint's weights, and measure with autocast off if they are finite",
                )
            hidden, self.hidden = self.hidden, {}
            yield rows, nats, hidden


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _opened(
    reference: Reference | None, checkpoint: Checkpoint, missing: Figure
) -> Iterator[tuple[Any, Figure | None]]:
    """Yield (model, None), the checkpoint's own where the weights are the same, or (None, NaN with the reason)."""
    if reference is None:
        yield None, missing
    elif reference.weights_sha256 == checkpoint.weights_sha256:
        yield checkpoint.model, None
    else:
        model = reference.load()
        ours, theirs = (dict(m.named_parameters()) for m in (checkpoint.model, model))
        if why := weights.same_shapes(ours, theirs):
            yield None, undefined(why)
        else:
            yield model.to(checkpoint.device).eval(), None


Shifts = dict[str, tuple["torch.Tensor", "torch.Tensor"]]
"""Layer -> what is taken from our and the base's vectors before they are summed: means of the first batch."""


@dataclass
class _Collected:
    """What one period gave; periods add up."""

    moments: dict[str, spectra.Moments] = field(default_factory=dict)
    pairs: dict[str, similarity.Pairs] = field(default_factory=dict)
    activity: dict[str, units.Activity] = field(default_factory=dict)
    nats: Floats = field(default_factory=lambda: np.zeros(0))
    """Losses in the order of the batches."""
    base_nats: Floats | None = None

    def __add__(self, other: _Collected) -> _Collected:
        return _Collected(
            {name: one + other.moments[name] for name, one in self.moments.items()},
            {name: one + other.pairs[name] for name, one in self.pairs.items()},
            {name: one + other.activity[name] for name, one in self.activity.items()},
        )

    def add(self, name: str, x_PD: torch.Tensor, y_PD: torch.Tensor | None, shifts: Shifts) -> None:
        """Add vectors of ours and, where it is compared, of the base."""
        if name not in shifts:
            shifts[name] = (x_PD.mean(0), (x_PD if y_PD is None else y_PD).mean(0))
        if y_PD is None:
            self.moments.setdefault(name, spectra.Moments(shifts[name][0])).add(x_PD)
            return
        if name not in self.pairs:
            self.pairs[name] = similarity.Pairs.about(*shifts[name])
            self.moments[name] = self.pairs[name].x
        self.pairs[name].add(x_PD, y_PD)


def _collect(
    windows: Windows,
    ours: _Runner,
    theirs: _Runner | None,
    shifts: Shifts,
    *,
    compare: bool,
    advance: Callable[[int], None],
) -> _Collected:
    """Run both models over one period, side by side; without ``theirs`` a comparison is with ourselves."""
    found = _Collected()
    nats: list[Floats] = []
    base_nats: list[Floats] = []
    other = None
    if theirs is not None:
        theirs.fast = ours.head_is_all(windows)  # so that batches are the same
        other = theirs.run(windows)
    for rows, our_nats, hidden in ours.run(windows):
        y_nats, y_hidden = our_nats, hidden
        if other is not None:
            _, y_nats, y_hidden = next(other)
        for name, x_PD in hidden.items():
            found.add(name, x_PD, y_hidden[name] if compare else None, shifts)
        nats.append(our_nats)
        base_nats.append(y_nats)
        advance(len(rows))
    found.activity = ours.activity
    found.nats = np.concatenate(nats)
    found.base_nats = np.concatenate(base_nats) if compare else None
    return found


@dataclass(frozen=True)
class _GradientBatch:
    """Token ids and targets, ``[B, T]``; places without a target hold IGNORE."""

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor


def _gradient_batches(windows: Windows, tokens_per_batch: int, device: torch.device) -> list[_GradientBatch]:
    """Lay rows out for a backward pass, in batches of about equal size."""
    import torch

    from clbench.train.data import IGNORE

    found = []
    for rows in batches(windows.n_input, tokens_per_batch, device):
        width = int(windows.n_input[rows].max())
        inputs, targets = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORE, np.int64)
        for row, index in enumerate(rows):
            tokens, n, k = windows.tokens[index], int(windows.n_input[index]), int(windows.n_scored[index])
            inputs[row, :n] = tokens[:n]
            targets[row, n - k : n] = tokens[n + 1 - k :]
        found.append(_GradientBatch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)))
    return found


def _forward_flops(model: Any, lengths: NDArray[np.int64]) -> float:
    from clbench.train.models import model_forward_flops

    unique, counts = np.unique(lengths, return_counts=True)
    return sum(
        model_forward_flops(model, n_tokens=int(n * count), length=int(n))
        for n, count in zip(unique, counts, strict=True)
    )


def parts_of(name: str) -> list[str]:
    """Return what a parameter counts in: ``all``, its kind, and its block where it has one."""
    from clbench.fisher.diagnostic import cell_of

    kind, layer = cell_of(name)
    return ["all", kind] + ([layer.replace("layer", "block")] if layer else [])


# --- rows


class _Table:
    """Rows while they are made: one a figure, item and period."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("item", "stage", "metric", "value", "n_tokens", "n_bytes", "group", "change")
        }

    def add(self, item: str, stage: int, metric: str, figure: Figure, n: int, group: str) -> None:
        """Add one; ``n`` is the number of samples that it is from."""
        change = f"{UNDEFINED}{figure.reason}" if figure.reason else ""
        row = (item, stage, metric, figure.value, n, 1, group, change)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)

    def add_all(self, item: str, stage: int, figures: dict[str, Figure], n: int, group: str, *, form: str = "") -> None:
        """Add several; ``form`` is joined to their names."""
        for name, figure in figures.items():
            self.add(item, stage, f"{name}:{form}" if form else name, figure, n, group)

    def add_activations(self, stage: int, one: _Collected, not_base: Figure | None, ratio: float) -> None:
        """Add the figures of representations and units of one period, or of all."""
        for name, moments in one.moments.items():
            n, first, last = moments.n, *(spectra.alpha_ranks(moments.width) or (0, 0))
            stated = {"n_per_width": n / moments.width, "alpha_first_rank": first, "alpha_last_rank": last}
            self.add_all(name, stage, {k: Figure(float(v)) for k, v in stated.items()}, n, "representation")
            for centred in (True, False):
                figures = spectra.figures(moments, centred=centred, least_ratio=ratio)
                form = "centred" if centred else "uncentred"
                self.add_all(name, stage, figures, n, "representation", form=form)
            if not_base is None:
                shift = similarity.figures(one.pairs[name], least_ratio=ratio)
            else:
                shift = dict.fromkeys(SHIFTS, not_base)
            self.add_all(name, stage, shift, n, "base")
        for name, activity in one.activity.items():
            self.add_all(name, stage, units.figures([activity]), activity.n, "units")
        n = max((activity.n for activity in one.activity.values()), default=1)
        self.add_all("all blocks", stage, units.figures(list(one.activity.values())), n, "units")

    def add_changes(
        self,
        stage: int,
        against: str,
        nats: Floats,
        before: Floats | None,
        windows: Windows,
        why: Figure | None,
        seed: int,
    ) -> None:
        """Add what the token losses of one period did since another checkpoint."""
        # Batches are of whole rows in the order of ``batches``, which depends on lengths alone, not on their size.
        order = np.argsort(-windows.n_input, kind="stable")
        documents = np.repeat(order, windows.n_scored[order])
        if before is None:
            assert why is not None
            figures = dict.fromkeys(CHANGES, why)
        else:
            figures = interference.opposition(nats - before, documents, seed=seed).figures
        self.add_all(against, stage, figures, len(nats), "interference")

    def add_size(self, part: str, size: weights.Size, whole: weights.Size, not_base: Figure | None) -> None:
        """Add the norms of one part of the parameters."""
        figures = {"mean_abs": size.mean_abs, "norm": Figure(float(np.sqrt(size.squared)))}
        figures["drift"] = not_base or size.drift
        figures["drift_share"] = not_base or weights.share_of_drift(size, whole)
        self.add_all(part, UNDATED, figures, size.n, "weights")

    def add_lengths(self, stage: int, half: str, lengths: Floats, norm: float) -> None:
        """Add what one half's gradients are, noise included."""
        figures = {"embedding_gradient_norm": Figure(float(lengths.mean())), "half_gradient_norm": Figure(norm)}
        self.add_all(f"half {half}", stage, figures, len(lengths), "gradients")

    def add_increment(self, stage: int, found: gradients.Increment | Figure, n: int) -> None:
        """Add the change of one period's loss since the previous checkpoint, in its parts."""
        if isinstance(found, gradients.Increment):
            rest_B = found.change_B - found.first_order_B
            figures = {
                "loss_change_nats": Figure(found.change_nats),
                "first_order_nats": Figure(found.first_order_nats),
                "curvature_nats": Figure(found.curvature_nats),
                "first_order_se_nats": _standard_error(found.first_order_B),
                "curvature_se_nats": _standard_error(rest_B),
            }
        else:
            figures = dict.fromkeys(INCREMENTS, found)
        self.add_all("previous", stage, figures, n, "gradients")

    def rows(self) -> Rows:
        """Return what was added."""
        arrays = {"stage": np.int64, "value": np.float64, "n_tokens": np.int64, "n_bytes": np.int64}
        columns: dict[str, Any] = {
            name: np.array(values, arrays[name]) if name in arrays else values for name, values in self.columns.items()
        }
        return Rows(**columns)


def _standard_error(values_B: Floats) -> Figure:
    """Return the standard error of a mean over sequences."""
    n = len(values_B)
    return Figure(float(values_B.std(ddof=1) / np.sqrt(n))) if n > 1 else undefined("fewer than 2 sequences")


SHIFTS = ("cka_debiased", "procrustes", "cosine_shift", "centred_shift")
INCREMENTS = ("loss_change_nats", "first_order_nats", "curvature_nats", "first_order_se_nats", "curvature_se_nats")
CHANGES = (
    *("interference", "magnitude_nats", "change_nats"),
    *("interference_null", "interference_null_blocks", "interference_null_blocks_low"),
    *(f"{name}_{side}" for name in ("interference", "magnitude_nats", "change_nats") for side in ("low", "high")),
)
"""Rows of comparisons, also where there is nothing to compare with."""
