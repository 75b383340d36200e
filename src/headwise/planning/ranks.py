"""A context over several processes: what one holds and sends, and from where on that pays."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from headwise.caches import Share, split
from headwise.errors import OptionError
from headwise.planning.costs import layer_cost
from headwise.planning.devices import Device
from headwise.planning.model import PlannedModel
from headwise.planning.workload import MOST_TOKENS, Workload
from headwise.spec import LayerSpec
from headwise.spec.checks import shown
from headwise.spec.dtypes import bytes_per_element

# What gloo takes on the loopback of one machine (benchmarks/context_parallel.py): seconds of a
# collective, whatever it carries, and bytes per second. A figure of the order, not of a machine.
LATENCY = 2e-4
LINK = 6e8
# What the ranks compare at each call: numbers of 8 bytes.
_COMPARED = 4 * 8


@dataclass(frozen=True)
class Ranks:
    """An estimate of a step whose contexts are spread over `count` processes.

    Each is a device of its own, with all weights. `cache_bytes`: of the rank that holds most.
    `sent_bytes`: what one rank sends for one token of each sequence, to all others together; the
    first one's, which sends the logits. `seconds`: what that takes on the link. `pays_from`: the
    context from which attention gains more than that; None where none does.
    """

    count: int
    cache_bytes: int
    sent_bytes: int
    seconds: float
    pays_from: int | None


def plan_ranks(
    count: int, model: PlannedModel, workload: Workload, device: Device, link: float
) -> Ranks:
    """The estimate, by formula.

    Raises:
        OptionError: a number of ranks that is none, or a model without a layer to spread.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count <= 2**16:
        raise OptionError(f"ranks is {shown(count)}, expected an int from 2 on")
    if isinstance(link, bool) or not isinstance(link, int | float) or not 0 < link < 2**80:
        raise OptionError(f"link is {shown(link)}, expected a number above 0")
    spec, vocabulary = model.spec, int(model.config.get("vocab_size", 0))
    layers = [layer for layer in spec.layers if _is_spread(layer)]
    if not layers or spec.encoder_layers:
        raise OptionError(f"ranks is {count}, and {spec.family} has no layer that can be spread")
    share = Share(0, count, split.BLOCK)
    others = [layer for layer in spec.layers if not _is_spread(layer)]

    def of_rank(context: int) -> Workload:
        return replace(workload, context=max(1, share.held(context)))

    held = of_rank(workload.context)
    nbytes = sum(map(held.layer_bytes, layers)) + sum(map(workload.layer_bytes, others))
    itemsize = bytes_per_element(workload.cache.dtype)
    rows = sum(_sent_by(layer, itemsize) for layer in layers) + vocabulary * itemsize
    sent = (count - 1) * (workload.batch * rows + _COMPARED)
    seconds = LATENCY * (len(layers) + 2) + sent / link

    def saved(context: int) -> float:
        whole = _seconds(layers, replace(workload, context=context), device)
        return whole - _seconds(layers, of_rank(context), device)

    pays = bisect_left(range(1, MOST_TOKENS), seconds, key=saved) + 1
    return Ranks(count, nbytes, sent, seconds, pays if pays < MOST_TOKENS else None)


def _is_spread(layer: LayerSpec) -> bool:
    attention = layer.attention
    if attention is None or layer.cached is None or layer.cross_attention is not None:
        return False
    return attention.window is None and attention.indexer is None


def _sent_by(layer: LayerSpec, itemsize: int) -> int:
    """Bytes of [out | lse] of one query."""
    assert layer.attention is not None
    return layer.attention.heads * (layer.attention.value_dim * itemsize + 4)


def _seconds(layers: list[LayerSpec], workload: Workload, device: Device) -> float:
    costs = [layer_cost(layer, workload) for layer in layers]
    dtype = workload.cache.dtype
    return workload.batch * sum(device.seconds(*cost, dtype) for cost in costs)
