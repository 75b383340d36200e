"""What a device makes of a model: the least time of a step, and what fits in its memory."""

import sys
from bisect import bisect_right
from dataclasses import dataclass, replace

from headwise.planning.costs import Cost, decode_cost, prefill_cost
from headwise.planning.devices import Device
from headwise.planning.weights import Weights
from headwise.planning.workload import MOST_TOKENS, Workload
from headwise.spec import ModelSpec
from headwise.spec.dtypes import bytes_per_element


@dataclass(frozen=True)
class Step:
    """A decode step or a prefill: what it moves and computes, and the least time for that.

    `tokens_per_second` counts all sequences; `bound` is "bandwidth" or "compute".
    """

    cost: Cost
    seconds: float
    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class Estimator:
    """A device, the weights that it holds, and the workload; each method takes a model's spec."""

    device: Device
    weights: Weights
    workload: Workload

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.weights.total * bytes_per_element(self.workload.cache.dtype)

    @property
    def free(self) -> int:
        """Bytes of memory that the weights leave."""
        return self.device.memory - self.weight_bytes

    def decode(self, spec: ModelSpec) -> Step:
        """One token for each sequence."""
        return self._step(decode_cost(spec, self.weights, self.workload), self.workload.batch)

    def prefill(self, spec: ModelSpec) -> Step:
        """The prompt of each sequence, or the encoder's tokens where there are both."""
        both = spec.encoder_layers and spec.layers
        tokens = self.workload.encoder_context if both else self.workload.context
        return self._step(
            prefill_cost(spec, self.weights, self.workload), self.workload.batch * tokens
        )

    def longest(self, spec: ModelSpec) -> int:
        """The context up to which is searched: the model's limit, or what is asked for beyond."""
        # who asks for more than the model was made for gets an answer, and a note
        return min(max(self.workload.context, spec.max_context or MOST_TOKENS), sys.maxsize - 1)

    def largest_context(self, spec: ModelSpec) -> int | None:
        """The largest context that fits at this batch, 0 if none does; None if nothing grows."""
        if self.workload.cache.token_bytes(spec) == 0:
            return None

        def needed(context: int) -> int:
            return replace(self.workload, context=context).held_bytes(spec)

        return bisect_right(range(1, self.longest(spec) + 1), self.free, key=needed)

    def largest_batch(self, spec: ModelSpec) -> int | None:
        """The largest batch that fits at this context; None if nothing is cached."""
        per_sequence = replace(self.workload, batch=1).held_bytes(spec)
        return max(0, self.free // per_sequence) if per_sequence else None

    def _step(self, cost: Cost, tokens: int) -> Step:
        device, dtype = self.device, self.workload.cache.dtype
        seconds = device.seconds(cost.bytes, cost.flops, dtype)
        by_memory = cost.bytes / device.bytes_per_second >= cost.flops / device.peak(dtype)
        return Step(cost, seconds, tokens / seconds, "bandwidth" if by_memory else "compute")
