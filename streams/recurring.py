"""``recurring``: periods that come back, so that relearning can be told from learning."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from clbench.derive import Taken
from clbench.errors import ConfigError, did_you_mean
from clbench.stream import Split, StageInfo
from clbench.streams import _arrange


class Recurring(_arrange.Arrangement):
    """The periods one after another, and then again.

    A period that comes n times is dealt into n parts of equal tokens, one for each time, so that no document trains
    twice; with ``repeat`` it comes whole each time. Its held-out documents are the same at every return: L[k][first
    time] and L[k][return] are measured on the same documents.
    """

    name = "recurring"

    @dataclass(frozen=True, kw_only=True)
    class Options(_arrange.Arrangement.Options):
        """Which periods come when."""

        seed: int = 0
        """Another seed deals the documents otherwise."""
        cycles: int = 2
        """How often all periods come."""
        sequence: tuple[str, ...] = ()
        """Names of periods in their order instead, such as 2013+2016+2013; periods that are not named are left out."""
        repeat: bool = False
        """Train on the same documents at every return, instead of on another part of the period."""

    def stages(self) -> list[StageInfo]:
        """Return ``2013``, ``2016``, ``2013 again``, ``2013 again 2`` …."""
        seen: Counter[str] = Counter()
        spans = []
        for info in self._sequence():
            again = ("", " again", f" again {seen[info.name]}")[min(seen[info.name], 2)]
            seen[info.name] += 1
            spans.append((info.name + again, [info]))
        return self.following(spans)

    def arranged(self, split: Split) -> list[Taken]:
        """Return the parts of the periods, in the order of the sequence."""
        times = Counter(info.index for info in self._sequence())
        parts = {}
        for info in self.periods:
            whole, n = self.period(split, info), times[info.index]
            if n:
                once = split == "train" and not self.options.repeat
                parts[info.index] = iter(self.dealt(split, whole, [1.0] * n, info.index) if once else [whole] * n)
        return [next(parts[info.index]) for info in self._sequence()]

    def _sequence(self) -> list[StageInfo]:
        """Return the periods in the order in which they come."""
        if not self.options.sequence:
            if self.options.cycles < 1:
                raise ConfigError(f"cycles={self.options.cycles}", where=self.name, mend="choose at least 1")
            return self.periods * int(self.options.cycles)
        periods = {info.name: info for info in self.periods}
        for name in self.options.sequence:
            if name not in periods:
                raise ConfigError(
                    f"there is no period {name!r}",
                    where=f"option sequence of {self.name}",
                    mend=did_you_mean(name, periods),
                )
        return [periods[name] for name in self.options.sequence]
