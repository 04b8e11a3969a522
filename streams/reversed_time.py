"""``reversed_time``: the periods from the newest to the oldest."""

from __future__ import annotations

from clbench.derive import Taken
from clbench.stream import Split, StageInfo
from clbench.streams import _arrange


class ReversedTime(_arrange.Arrangement):
    """The periods in reverse order, each with its own name, dates and documents.

    Change kinds follow the new order: a page's oldest version is ``changed`` when a younger one came before it.
    """

    name = "reversed-time"

    def stages(self) -> list[StageInfo]:
        """Return the kept stages, then the periods backwards."""
        return self.following([(info.name, [info]) for info in reversed(self.periods)])

    def arranged(self, split: Split) -> list[Taken]:
        """Return whole periods."""
        return [self.period(split, info) for info in reversed(self.periods)]
