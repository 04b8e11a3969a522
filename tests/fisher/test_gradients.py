"""Gradients of single sequences against one backward pass a sequence."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clbench.errors import ConfigError, NonFiniteError
from clbench.fisher import gradients
from clbench.fisher.gradients import dot_each_sequence, each_sequence
from clbench.train.data import IGNORE

WORDS, T, B = 23, 7, 4


def llama(tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=True,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False)
    return get_peft_model(llama(), config)


class Small(nn.Module):
    """An embedding, a middle and a head; ``middle`` gets and gives [B, T, 8]."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.middle = middle
        self.head = nn.Linear(8, WORDS)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.middle(self.embed(input_ids))))


class OnePlus(nn.Module):
    """Gemma's norm: 1 + w, no closed form of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * F.rms_norm(x, (8,))


class MeanScale(nn.Module):
    """Looks like a scale at w = 1, where it gives x, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.mean()


class Squared(MeanScale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight**2


class Subclassed(nn.Linear):
    """A Linear in name only."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.tanh(), self.bias)


class Norm(nn.RMSNorm):
    """With a weight of zero, by which nothing can be divided."""

    def __init__(self) -> None:
        super().__init__(8)
        with torch.no_grad():
            self.weight.normal_()[3] = 0.0


class Twice(nn.Module):
    """One layer used twice, with another norm between, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.unused = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(torch.tanh(self.layer(x))))


class Places(nn.Module):
    """Learned places without a batch dimension: their gradient is summed over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(WORDS, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places(torch.arange(x.shape[1]))


class Reaching(nn.Module):
    """Uses the weight of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.child(x), self.child.weight)


class Experts(nn.Module):
    """The tokens of all sequences stand in one dimension, and by accident B of them go to the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, n = x.flatten(0, 1), len(x)
        return torch.cat((self.expert(flat[:n]), flat[n:])).view_as(x)


class Mixing(nn.Module):
    """Sequences see each other: per-sequence gradients of the parameter do not follow from rows of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight * (x - x.mean(0, keepdim=True).detach())


FAST: dict[str, Callable[[], nn.Module]] = {
    "llama, tied": llama,
    "llama, untied": lambda: llama(tied=False),
    "gpt2": gpt2,
    "neox": neox,
    "lora": lora,
    "one plus": lambda: Small(OnePlus()),
    "mean scale": lambda: Small(MeanScale()),
    "squared": lambda: Small(Squared()),
    "subclassed": lambda: Small(Subclassed()),
    "twice": lambda: Small(Twice()),
    "rms norm": lambda: Small(nn.RMSNorm(8)),
    "zero in a norm": lambda: Small(Norm()),
}
SLOW: dict[str, Callable[[], nn.Module]] = {
    "places": lambda: Small(Places()),
    "reaching": lambda: Small(Reaching()),
    "experts": lambda: Small(Experts()),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # no weight at a special value, but where a test wants it
        for p in model.parameters():
            if p.requires_grad and not isinstance(model, Small):
                p.add_(0.1 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    return model


def rows(n: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with repeats, targets of which some are left out: rows of different lengths, one empty."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(WORDS, (n, T), generator=generator)
    inputs[0, :3] = 5
    targets = torch.randint(WORDS, (n, T), generator=generator)
    targets[1, 4:] = IGNORE
    targets[2] = IGNORE
    return inputs, targets


def brute_force(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """One batch of one row at a time, PyTorch's own mean over targets."""
    model.eval()
    found: dict[str, list[torch.Tensor]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(input_ids=x[None]).logits[0], y, ignore_index=IGNORE)
        if (y != IGNORE).any():
            loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def visited(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, **options: object
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, gradient: torch.Tensor) -> None:
        assert name not in found, f"{name} was visited twice"
        found[name] = gradient.clone()

    each_sequence(model, inputs, targets, visit, **options)  # type: ignore[arg-type]
    return found


def check(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    scale = max(float(g.abs().max()) for g in right.values())
    for name, gradient in right.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", FAST)
def test_one_pass_gives_what_one_backward_a_sequence_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, targets) = made(FAST[name]), rows()
    monkeypatch.setattr(gradients, "_one_by_one", lambda *_: pytest.fail("took the slow path"))
    check(visited(model, inputs, targets), brute_force(model, inputs, targets))


@pytest.mark.parametrize("name", SLOW)
def test_where_hooks_cannot_tell_the_slow_path_is_taken_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, targets) = made(SLOW[name]), rows()
    taken = []
    slow = gradients._one_by_one
    monkeypatch.setattr(gradients, "_one_by_one", lambda *a: taken.append(1) or slow(*a))
    check(visited(model, inputs, targets), brute_force(model, inputs, targets))
    assert taken


def test_a_square_batch_and_a_single_row_are_right() -> None:
    model = made(llama)
    for n in (1, T):
        inputs, targets = rows(T)
        inputs, targets = inputs[:n], targets[:n]
        check(visited(model, inputs, targets), brute_force(model, inputs, targets))


def test_slow_path_in_groups_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, targets) = made(SLOW["experts"]), rows()
    monkeypatch.setattr(gradients, "BUFFER_ELEMENTS", 500)
    check(visited(model, inputs, targets), brute_force(model, inputs, targets))


def test_a_module_in_which_sequences_see_each_other_is_never_taken_for_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, targets) = made(lambda: Small(Mixing())), rows()
    taken = []
    slow = gradients._one_by_one
    monkeypatch.setattr(gradients, "_one_by_one", lambda *a: taken.append(1) or slow(*a))
    visited(model, inputs, targets)
    assert taken


def test_padding_gets_no_gradient() -> None:
    model, (inputs, targets) = made(lambda: Small(nn.Identity())), rows()
    model.embed.padding_idx = 5  # type: ignore[union-attr]
    found = visited(model, inputs, targets)
    check(found, brute_force(model, inputs, targets))
    assert not found["embed.weight"][:, 5].any()


def test_activations_changed_in_place_are_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            y = self.layer(x)
            x.mul_(0.5)  # autograd would refuse this too, did it compute weight gradients
            return x + y

    model, (inputs, targets) = made(lambda: Small(InPlace())), rows()
    with pytest.raises(ConfigError, match="in place"):
        visited(model, inputs, targets)


def test_losses_are_means_over_targets_in_float64() -> None:
    model, (inputs, targets) = made(llama), rows()
    losses = each_sequence(model, inputs, targets, lambda *_: None)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    right = [
        F.cross_entropy(one.double(), y, ignore_index=IGNORE) if (y != IGNORE).any() else torch.tensor(0.0).double()
        for one, y in zip(logits, targets, strict=True)
    ]
    assert losses.dtype == torch.float64 and not losses.requires_grad
    torch.testing.assert_close(losses, torch.stack(right), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "twice", "lora"])
def test_dots_without_gradients_are_the_dots_of_the_gradients(name: str) -> None:
    model, (inputs, targets) = made(FAST[name]), rows()
    right = brute_force(model, inputs, targets)
    direction = {n: torch.randn(g.shape[1:]) for n, g in right.items()}
    expected = sum((g * direction[n]).flatten(1).double().sum(1) for n, g in right.items())
    _, dots = dot_each_sequence(model, inputs, targets, direction)
    torch.testing.assert_close(dots, expected, rtol=1e-4, atol=1e-4)


def test_only_named_parameters_are_visited_and_unknown_names_refused() -> None:
    model, (inputs, targets) = made(llama), rows()
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
    found = visited(model, inputs, targets, names=names)
    right = brute_force(model, inputs, targets)
    check(found, {name: right[name] for name in names})
    with pytest.raises(ConfigError, match="no parameter nothing"):
        visited(model, inputs, targets, names=["nothing"])


def state(model: nn.Module) -> list[object]:
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [[m.training for m in model.modules()], flags, hooks]


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model, (inputs, targets) = made(llama), rows()
    model.train()
    model.model.layers[0].eval()  # type: ignore[union-attr,index,operator]
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)  # type: ignore[union-attr,arg-type]
    model.model.norm.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    before = state(model)
    visited(model, inputs, targets)
    torch.testing.assert_close(state(model), before)

    def stop(name: str, gradient: torch.Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        each_sequence(model, inputs, targets, stop)
    torch.testing.assert_close(state(model), before)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")  # type: ignore[union-attr,index,operator]
    with pytest.raises(NonFiniteError):
        visited(model, inputs, targets)
    torch.testing.assert_close(state(model), before)


def test_it_works_where_gradients_are_off_and_drop_out_is_on() -> None:
    model, (inputs, targets) = made(lora), rows()
    right = brute_force(model, inputs, targets)
    model.train()
    with torch.no_grad():
        found = visited(model, inputs, targets)
    assert model.training
    check(found, right)
    assert all("lora" in name for name in found)
