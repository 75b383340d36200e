"""Packing the weights of a loaded model, and giving the numbers back where they were kept."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, UnsupportedError
from headwise.hf.module_hook import is_touched
from headwise.hf.packed.modules import PackedWeight
from headwise.hf.packed.replace import is_holder, packed_module
from headwise.hf.stock_names import Conv1D
from headwise.ops import format_of, round_blocks

# Bits of what `attach` takes.
ROUNDINGS = {"int8": 8, "int4": 4}
# What decides which experts run, or which class, is not rounded further than to 8 bits.
_DECIDES = {"gate", "router", "score", "classifier"}
# Largest numbers between these: scales are float16.
_LEAST, _MOST = 1e-3, 6e4


@dataclass
class Packing:
    """How the weights of a model were packed: what it takes to give them back.

    Args:
        weights: a name of `ROUNDINGS`.
        kept: the packed modules, each with the one that was there; None where those were not kept.
        left: why a product or an embedding stays as it is, by name.
    """

    weights: str
    kept: list[tuple[nn.Module, nn.Module]] | None
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = dict.fromkeys(self.left.values())
        said = [f"{list(self.left.values()).count(why)} stay: {why}" for why in reasons]
        return "; ".join([f"rounded to {self.weights}", *said])


def check_request(weights: str | None, keep: bool, packing: Packing | None) -> None:
    """Refuse what cannot be done to a model that was packed so before, or not.

    Raises:
        OptionError: says what, and what to do.
    """
    if weights not in (None, *ROUNDINGS):
        raise OptionError(f"weights is {weights!r}, expected {' or '.join(map(repr, ROUNDINGS))}")
    if keep and weights is None:
        raise OptionError('keep is True, and no weights are packed: give weights="int8" or "int4"')
    if packing is None:
        return
    if weights not in (None, packing.weights):
        raise OptionError(
            f"weights is {weights!r}, and the model's are packed in {packing.weights} already: "
            "detach it, or load it again"
        )
    if keep and packing.kept is None:
        raise OptionError("keep is True, and the model's own weights are gone: load it again")


def choose(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What can be packed, by the name of the weight, and why others cannot.

    Raises:
        UnsupportedError: there is none that can be packed.
    """
    chosen, left = dict[str, nn.Module](), dict[str, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            continue
        reason = _obstacle(name, module, model)
        if reason is None:
            chosen[name] = module
        else:
            left[name] = reason
    if not chosen:
        packed = any(isinstance(module, PackedWeight) for module in model.modules())
        why = next(iter(left.values()), "they are packed already" if packed else "it has none")
        raise UnsupportedError(f"no weights of {type(model).__name__} can be packed: {why}")
    return chosen, left


def pack_model(model: nn.Module, weights: str, *, keep: bool) -> Packing:
    """Put rounded weights in place of a model's products and embeddings: all, or none.

    Raises:
        UnsupportedError: there is none that can be packed; nothing is changed.
    """
    chosen, left = choose(model)
    eight, matrices = _in_eight_bits(model, chosen), dict[int, Tensor]()
    made: dict[int, nn.Module] = {}
    for name, module in chosen.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if id(weight) not in matrices:  # a tied head and its embedding share theirs
            rows = weight.t() if type(module) is Conv1D else weight
            matrices[id(weight)] = round_blocks(rows, 8 if name in eight else ROUNDINGS[weights])
        if id(module) not in made:
            made[id(module)] = packed_module(module, matrices[id(weight)], weight.dtype)
    for name, module in chosen.items():
        model.set_submodule(name, made[id(module)])
    pairs = {id(module): (made[id(module)], module) for module in chosen.values()}
    return Packing(weights, list(pairs.values()) if keep else None, left)


def unpack_model(model: nn.Module, packing: Packing) -> None:
    """Put back the modules that were there.

    Raises:
        UnsupportedError: they were not kept; nothing is changed.
    """
    if packing.kept is None:
        raise UnsupportedError(
            f'{type(model).__name__} was attached with weights="{packing.weights}", and its own '
            "were not kept: load it again, or attach it with keep=True"
        )
    was = {id(packed): (packed, module) for packed, module in packing.kept}
    # by what is there now: layers may have been moved or removed since
    now = [
        (name, *was[id(module)])
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in was
    ]
    for name, packed, module in now:
        assert isinstance(packed, PackedWeight)
        module.train(packed.training).to(packed.packed.device, packed.like.dtype)
        model.set_submodule(name, module)


def _obstacle(name: str, module: nn.Module, model: nn.Module) -> str | None:
    kind = type(module)
    if not is_holder(module) and kind is not Conv1D:
        return f"a class of its own, {kind.__name__}"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return "no plain weights on the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weights in {str(weight.dtype).removeprefix('torch.')}"
    columns = weight.shape[0 if kind is Conv1D else 1]
    if columns % 32 or not weight.numel():
        return "rows that are no multiple of 32"
    if is_touched(module):
        return "hooks, or a forward that is replaced"
    if getattr(module, "max_norm", None) is not None:
        return "an embedding with max_norm"
    around = model
    for part in name.split(".")[:-1]:
        around = around.get_submodule(part)
        if not type(around).__module__.startswith(("transformers.", "torch.nn.", "headwise.")):
            return f"part of {type(around).__name__}, a class of {type(around).__module__}"
    if name.endswith("kv_b_proj") and hasattr(type(around), "expand_kv"):
        return "MLA's up-projection, which is absorbed"
    largest = float(weight.detach().abs().max())
    held = largest == 0 or _LEAST <= largest <= _MOST
    return None if held else f"numbers up to {largest:.0e}, whose scales float16 does not hold"


def _in_eight_bits(model: nn.Module, names: dict[str, nn.Module]) -> set[str]:
    """The embeddings, the heads and the routers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in names.items()
        if module is head or isinstance(module, nn.Embedding) or _DECIDES & set(name.split("."))
    }


def packed_formats(model: nn.Module) -> list[str]:
    """The formats of a model's packed weights."""
    packed = (module.packed for module in model.modules() if isinstance(module, PackedWeight))
    return sorted({format_of(matrix).name for matrix in packed})


def packed_words(model: nn.Module, packing: Packing | None) -> str | None:
    """What a report says of a model's packed weights; None where it has none."""
    count = sum(isinstance(module, PackedWeight) for module in model.modules())
    said = f"packed weights: {count} modules in {', '.join(packed_formats(model))}"
    if packing is not None:
        said = f"{said}, {packing}"
    return said if count else None
