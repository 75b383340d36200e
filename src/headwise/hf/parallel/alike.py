"""What keeps the ranks of a context alike: the same model, the same inputs, the same logits."""

import inspect
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from headwise.hf.parallel.ranks import Ranks
from headwise.hf.stock_names import Cache

# Elements of each parameter that are looked at.
_LOOKED_AT = 64
# What is set to the first rank's where it differs: the numbers that sampling draws.
_DRAWS = "the random numbers"


def require_same_model(model: nn.Module, asked: str, ranks: Ranks) -> None:
    """Check that every rank attaches the same model alike, by some numbers of each weight.

    Raises:
        RankError: one does not.
    """
    weights = xxhash.xxh3_64()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // _LOOKED_AT)]
        weights.update(some.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    numbers = {
        "the weights": _number(weights),
        "the options of attach": _number(xxhash.xxh3_64(asked.encode())),
    }
    ranks.require_alike(ranks.differing(numbers, _device(model)))


class SameInputs:
    """Forward pre-hook: compares what the ranks are given, and has them draw the same numbers."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        named = ("input_ids", "attention_mask")
        parts = {name: _digest({name: given.pop(name, None)}) for name in named}
        parts["the arguments of the call"] = _digest(given)
        parts[_DRAWS] = _digest({"state": torch.get_rng_state()})
        device = _device(model)
        if device.type == "cuda":
            parts[_DRAWS] ^= _digest({"state": torch.cuda.get_rng_state(device)})
        differing = self.ranks.differing(parts, device)
        if differing.pop(_DRAWS, None) is not None:
            _draw_alike(self.ranks, device)
        self.ranks.require_alike(differing)


class SameLogits:
    """Forward hook: every rank goes on with the logits of the first."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # return_dict=False: the logits are all that has 3 dims
            return tuple(map(self._first, output))
        if "logits" in output:
            output["logits"] = self._first(output["logits"])
        return output

    def _first(self, logits: Any) -> Any:
        shared = isinstance(logits, Tensor) and logits.ndim == 3 and not logits.requires_grad
        return self.ranks.broadcast(logits) if shared else logits


def _draw_alike(ranks: Ranks, device: torch.device) -> None:
    """Set the random numbers to come to the first rank's."""
    torch.set_rng_state(ranks.broadcast(torch.get_rng_state().to(device)).cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        torch.cuda.set_rng_state(ranks.broadcast(state).cpu(), device)


def _digest(given: dict[str, Any]) -> int:
    """A number of arguments: of whole numbers all of them, of others what they are."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(given.items()):
        if isinstance(value, Cache):
            value = value.get_seq_length() if value.layers else 0
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if not value.is_floating_point() and value.numel():
                whole = value.detach().cpu().contiguous().flatten()
                digest.update(whole.view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, str | int | float):
            digest.update(f"{name} {value!r}".encode())
    return _number(digest)


def _number(digest: Any) -> int:
    return int(digest.intdigest()) >> 1  # of 63 bits


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
