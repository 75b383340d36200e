"""What of a decoding step beside attention is replaced, module by module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwise.hf.module_hook import ModuleHook


@dataclass(frozen=True, eq=False)
class Replaced:
    """Modules of one kind, by name, and why one stays with Transformers (None: it is ours).

    what: in the report, before how many `units` of them are ours. forward: what stands in for the
    `forward` of one that is.
    """

    what: str
    units: str
    reasons: dict[str, str | None]
    forward: Callable[[Any], ModuleHook]

    def __str__(self) -> str:
        """How many are ours, and one of those that stay for each reason."""
        ours, every = list(self.reasons.values()).count(None), len(self.reasons)
        said = f"{self.what}: {ours} of {every} {self.units} on cpu"
        for reason in dict.fromkeys(filter(None, self.reasons.values())):
            names = [name for name, why in self.reasons.items() if why == reason]
            more = f" and {len(names) - 1} more stay" if len(names) > 1 else " stays"
            said += f"; {names[0]}{more} with Transformers: {reason}"
        return said
