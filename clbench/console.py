"""What a person sees while something runs: bars on a terminal, one line a milestone elsewhere, all on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

stderr = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line for people."""
    stderr.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print one warning line."""
    stderr.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


class TrainingBar:
    """A bar a stage; call it after every step, as ``train.loop.Job.progress`` asks."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title
        self.task: TaskID | None = None
        self.stage = -1

    def __call__(self, stage: object, done: int, total: int, loss_nats: float) -> None:
        """Show one more step."""
        index = int(getattr(stage, "index", 0))
        if index != self.stage or self.task is None:
            self.task = self.progress.add_task(f"{self.title} · stage {index}", total=total, loss="")
            self.stage = index
        self.progress.update(self.task, completed=done, total=total, loss=f"{loss_nats:.3f} nats")


@contextmanager
def training_bar(title: str) -> Iterator[TrainingBar]:
    """Yield a bar for a training run; silent when stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        yield TrainingBar(progress, title)


@contextmanager
def counting_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, int, str], None]]:
    """Yield what is told (done, total, text) after every item: a bar on a terminal, one line an item elsewhere."""
    if not stderr.is_terminal:
        yield lambda n, of, text: say(f"{n} of {of} {what}: {text}")
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} " + what),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        bar = progress.add_task("", total=total, completed=done)
        yield lambda n, of, text: progress.update(bar, completed=n, total=of, description=text)
