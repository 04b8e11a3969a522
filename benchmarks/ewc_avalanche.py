"""What a step of diagonal EWC costs: ours against avalanche's ``EWCPlugin``, in one loop on one network.

    pip install avalanche-lib==0.6.0 torchvision        not a dependency; torchvision must fit the installed torch
    python -m benchmarks.ewc_avalanche
    python -m benchmarks.ewc_avalanche --clock cpu      processor seconds: for a machine that is not idle

One process, one multilayer perceptron, one plain loop with the same batches, AdamW and start for all: without a
penalty, with ours (``methods/_quadratic.pull`` after the backward pass), and with the plugin's ``before_backward`` on
the loss. The plugin estimates and keeps the importances itself, in its separate mode: one term a past task. Ours gets
the same importances, collapsed into two vectors as ``methods/ewc.py`` does. First both gradients of the penalty are
compared at weights that have moved (its lambda is half of our strength: the plugin's penalty has no 1/2).

Blocks alternate: plain ours plain avalanche plain …; a block's extra seconds are those over the mean of the two plain
ones around it. Medians with a distribution-free 95 % interval (six rounds at least). A first round is not counted.

Last, the Fisher values of both on the same weights and samples: the plugin squares the mean gradient of a mini-batch,
ours (``clbench.fisher``) is the mean of the squares over samples. Both are summed over parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.methods import median_interval
from clbench.errors import ClbenchError, ConfigError
from clbench.fisher.estimate import second_moment
from clbench.methods import _quadratic as quadratic

EXPECTED = 2.0
"""How many times less extra time our step is expected to take."""
TOLERANCE = 1e-4
"""Largest relative difference of the two penalties' gradients."""
Step = Callable[[int], None]


@dataclass(frozen=True)
class Network:
    """The perceptron and its batch."""

    inputs: int = 256
    hidden: int = 512
    layers: int = 2
    classes: int = 10
    batch: int = 64
    samples: int = 1024
    """Of every task."""
    learning_rate: float = 1e-3


@dataclass
class Collapsed:
    """The terms of all past tasks as one, exactly: ``sum_k F_k (theta - a_k)^2 = F (theta - a)^2 + const``."""

    weights: list[torch.Tensor] = field(default_factory=list)
    anchors: list[torch.Tensor] = field(default_factory=list)

    def add(self, fisher: Sequence[torch.Tensor], here: Sequence[torch.Tensor]) -> None:
        """Take in a task's Fisher at its end's weights."""
        if not self.weights:
            self.weights, self.anchors = [f.clone() for f in fisher], [t.clone() for t in here]
            return
        for weight, anchor, f, t in zip(self.weights, self.anchors, fisher, here, strict=True):
            weight += f
            anchor.lerp_(t, f / weight.clamp_min(1e-38))


@dataclass
class Lived:
    """A network after some tasks, and what both hold of them."""

    model: nn.Sequential
    plugin: Any
    collapsed: Collapsed
    data: tuple[torch.Tensor, torch.Tensor]
    """Of the task that is trained now."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.model.parameters())


def load_plugin() -> Any:
    """Return avalanche's plugin class.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("avalanche.training.plugins").EWCPlugin
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises the latter
        raise ConfigError(
            f"avalanche cannot be imported: {str(error).splitlines()[0]}",
            mend="pip install avalanche-lib==0.6.0 and the torchvision that fits your torch",
        ) from None


def make_task(network: Network, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples in clusters, one a class, and their classes."""
    generator = torch.Generator().manual_seed(task)
    centres = torch.randn(network.classes, network.inputs, generator=generator)
    y = torch.randint(network.classes, (network.samples,), generator=generator)
    return centres[y] + 2 * torch.randn(network.samples, network.inputs, generator=generator), y


def make_model(network: Network) -> nn.Sequential:
    """Return the perceptron."""
    torch.manual_seed(0)
    sizes = [network.inputs, *[network.hidden] * network.layers]
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], network.classes))


def batches_of(network: Network, data: tuple[torch.Tensor, torch.Tensor], n_steps: int) -> Iterator[Any]:
    """Yield mini-batches, in order and again."""
    n_batches = network.samples // network.batch
    for step in range(n_steps):
        rows = slice(step % n_batches * network.batch, (step % n_batches + 1) * network.batch)
        yield data[0][rows], data[1][rows]


def train(network: Network, lived: Lived, held: str, n_steps: int, strength: float) -> None:
    """Train some steps: the one loop of all; ``held`` is plain, ours or avalanche."""
    parameters = lived.parameters
    optimizer = torch.optim.AdamW(parameters, lr=network.learning_rate, fused=True)
    strategy = strategy_of(lived)
    for x, y in batches_of(network, lived.data, n_steps):
        strategy.loss = cross_entropy(lived.model(x), y)
        if held == "avalanche":
            lived.plugin.before_backward(strategy)
        strategy.loss.backward()
        if held == "ours":
            quadratic.pull(parameters, lived.collapsed.anchors, strength, lived.collapsed.weights)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def strategy_of(lived: Lived) -> SimpleNamespace:
    """Return what the plugin reads and writes of a strategy."""
    clock = SimpleNamespace(train_exp_counter=len(lived.plugin.saved_params))
    return SimpleNamespace(clock=clock, model=lived.model, device="cpu", loss=None)


def live(network: Network, plugin: Any, n_tasks: int, strength: float) -> Lived:
    """Train through past tasks; the plugin takes in each at its end, and ours what it found."""
    lived = Lived(make_model(network), plugin(strength / 2), Collapsed(), make_task(network, 0))
    for task in range(n_tasks):
        lived.data = make_task(network, task)
        train(network, lived, "plain", network.samples // network.batch, strength)
        end = strategy_of(lived)
        end._criterion, end.optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(lived.parameters, lr=0.0)
        end.experience = SimpleNamespace(dataset=torch.utils.data.TensorDataset(*lived.data, lived.data[1]))
        end.train_mb_size = network.batch
        lived.plugin.after_training_exp(end)
        fisher = [lived.plugin.importances[task][name].data for name, _ in lived.model.named_parameters()]
        lived.collapsed.add(fisher, [p.detach() for p in lived.parameters])
        lived.model.zero_grad(set_to_none=True)
    lived.data = make_task(network, n_tasks)
    train(network, lived, "plain", 8, strength)  # away from the anchors
    return lived


def check_gradients(lived: Lived, strength: float) -> float:
    """Return the relative difference of both penalties' gradients.

    Raises:
        ConfigError: they are not the same penalty.
    """
    strategy = strategy_of(lived)
    strategy.loss = torch.zeros((), requires_grad=True) * 1.0
    lived.plugin.before_backward(strategy)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(strategy.loss, lived.parameters)])
    for p in lived.parameters:
        p.grad = torch.zeros_like(p)
    quadratic.pull(lived.parameters, lived.collapsed.anchors, strength, lived.collapsed.weights)
    ours = torch.cat([p.grad.flatten() for p in lived.parameters if p.grad is not None])
    lived.model.zero_grad(set_to_none=True)
    gap = float((ours - theirs).norm() / theirs.norm())
    if not gap <= TOLERANCE:
        raise ConfigError(f"not the same penalty: gradients differ by {gap:.2g} of their length")
    return gap


def measure(
    network: Network, lived: Lived, strength: float, n_steps: int, repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Return the extra seconds of a step of both, from blocks in turn; every block begins at the same weights."""
    start = {name: tensor.clone() for name, tensor in lived.model.state_dict().items()}

    def block(held: str) -> float:
        lived.model.load_state_dict(start)
        begun = clock()
        train(network, lived, held, n_steps, strength)
        return (clock() - begun) / n_steps

    plain: list[float] = []
    extra: dict[str, list[float]] = {"ours": [], "avalanche": []}
    for number in range(repeats + 1):
        before = block("plain")
        for held, values in extra.items():
            seconds, after = block(held), block("plain")
            if number:
                values.append(seconds - (before + after) / 2)
                plain.append(after)
            before = after
    ratios = [b / a if a > 0 else float("inf") for a, b in zip(extra["ours"], extra["avalanche"], strict=True)]
    found: dict[str, dict[str, Any]] = {held: summary(values) for held, values in extra.items()}
    base = statistics.median(plain)
    for entry in found.values():
        entry["over_plain"] = entry["median"] / base
    ratio = statistics.median(extra["avalanche"]) / statistics.median(extra["ours"])
    return {"plain_s": base, "extra_s": found, "ratio_of_medians": ratio, "ratio": summary(ratios)}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the median and its interval, None below six values."""
    low, high = median_interval(values)
    return {"median": statistics.median(values)} | ({"low": low, "high": high} if low == low else {"low": None})


# --- Fisher values ----------------------------------------------------------------------------------------------------


class OneToken(nn.Module):
    """The network as a language model of one position, for ``clbench.fisher``; a "token" is a sample's number."""

    def __init__(self, model: nn.Module, x_ND: torch.Tensor) -> None:
        super().__init__()
        self.model, self.x_ND = model, x_ND

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Return logits of shape ``[B, 1, classes]``."""
        return SimpleNamespace(logits=self.model(self.x_ND[input_ids]))


def fisher_factors(network: Network, lived: Lived) -> dict[str, float]:
    """Return the sums of Fisher values: ours, and the plugin's at batches of 1 and at the network's batch."""
    data = lived.data
    samples = torch.split(torch.arange(network.samples)[:, None], network.batch)
    rows: Any = [SimpleNamespace(inputs_BT=ids_BT, targets_BT=data[1][ids_BT]) for ids_BT in samples]
    ours = sum(f.sum().item() for f in second_moment(OneToken(lived.model, data[0]), rows)[0].values())
    dataset = torch.utils.data.TensorDataset(*data, data[1])

    def theirs(batch: int) -> float:
        optimizer = torch.optim.SGD(lived.parameters, lr=0.0)
        found = lived.plugin.compute_importances(
            lived.model, nn.CrossEntropyLoss(), optimizer, dataset, "cpu", batch_size=batch
        )
        lived.model.zero_grad(set_to_none=True)
        return float(sum(f.data.sum().item() for f in found.values()))

    by_batch = {f"avalanche_batch_{batch}": theirs(batch) for batch in (1, network.batch)}
    return {"ours": ours, **by_batch, "factor": ours / by_batch[f"avalanche_batch_{network.batch}"]}


# --- what is run ------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for."""
    plugin = load_plugin()
    network = Network(hidden=arguments.hidden, batch=arguments.batch)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    found: dict[str, Any] = {"facts": facts_of(network, arguments), "tasks": {}}
    for n_tasks in arguments.past or (1, 5, 10):
        lived = live(network, plugin, n_tasks, arguments.strength)
        entry: dict[str, Any] = {"gradients_differ_by": check_gradients(lived, arguments.strength)}
        entry |= measure(network, lived, arguments.strength, arguments.steps, arguments.repeats, clock)
        least = entry["ratio"]["low"] if entry["ratio"]["low"] is not None else entry["ratio"]["median"]
        entry["verdict"] = "met" if least >= EXPECTED else "not met" if entry["ratio"]["median"] < EXPECTED else "open"
        found["tasks"][n_tasks] = entry
    found["fisher"] = fisher_factors(network, lived)
    return found


def facts_of(network: Network, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on."""
    from importlib.metadata import version

    return {
        "n_cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "avalanche": version("avalanche-lib"),
        "n_parameters": sum(p.numel() for p in make_model(network).parameters()),
        "batch": network.batch,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "steps": arguments.steps,
    }


def report(found: dict[str, Any]) -> None:
    """Print what was found."""
    print(", ".join(f"{key} {value}" for key, value in found["facts"].items()))
    for n_tasks, entry in found["tasks"].items():
        print(f"{n_tasks} past tasks: plain {entry['plain_s'] * 1e3:.3f} ms a step;", end=" ")
        print(f"penalties' gradients agree to {entry['gradients_differ_by']:.1e}")
        for held, values in entry["extra_s"].items():
            print(f"  {held:10} + {shown(values, 1e3)} ms, {values['over_plain']:.1%} of a plain step")
        print(f"  avalanche / ours {shown(entry['ratio'])}; at least {EXPECTED:.0f} expected: {entry['verdict']}")
    fisher = found["fisher"]
    print("sum of Fisher values: " + ", ".join(f"{name} {value:.4g}" for name, value in fisher.items()))


def shown(values: dict[str, Any], scale: float = 1.0) -> str:
    """Return a median with its interval."""
    bounds = f" [{values['low'] * scale:.3f}, {values['high'] * scale:.3f}]" if values["low"] is not None else ""
    return f"{values['median'] * scale:.3f}{bounds}"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, action="append", help="past tasks; may be given often; 1, 5 and 10")
    parser.add_argument("--hidden", type=int, default=Network.hidden, help="width of the hidden layers")
    parser.add_argument("--batch", type=int, default=Network.batch)
    parser.add_argument("--strength", type=float, default=10.0, help="ours; avalanche's lambda is half of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50, help="of a block")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    if min(arguments.steps, arguments.repeats, arguments.hidden, *(arguments.past or [1])) < 1:
        parser.error("give at least 1 step, round, unit and past task")
    if not 1 <= arguments.batch <= Network.samples:
        parser.error(f"give a batch of 1 to {Network.samples}")
    torch.set_num_threads(arguments.threads)
    try:
        found = run(arguments)
    except ClbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        report(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
