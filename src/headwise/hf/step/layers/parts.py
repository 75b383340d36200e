"""What the operators take of one decoder layer: found at attach, looked at again at each call."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headwise.hf.module_hook import is_touched, parameters_of
from headwise.hf.packed import PackedLinear, weight_of
from headwise.hf.step.codes import ACTIVATIONS, NORMS
from headwise.ops import weight_sizes
from headwise.spec.config.decoder_layer import DecoderLayer

_ABSENT = object()

# A value that stands in a dict under a key.
Fact = tuple[Mapping[str, Any], str, Any]


class Unfit(Exception):
    """Why a layer, as it is now, is not what the operators take."""


@dataclass(frozen=True, eq=False, slots=True)
class Arguments:
    """What the operators are given at every call, and the facts that it was made of.

    before, after: arguments of the first and of the second operator. options: scale, window and
    softcap of the attention inside the first; asks: the same as our attention function takes them.
    sinks: of the attention. multiplier: of what an MLP of its own adds. angles: of a position, 0
    where nothing is rotated. children: the layer's own, which are no fact as its dict would keep it
    alive; as is scale, what it multiplies by. offers: what is known to run the last kind of call.
    """

    facts: list[Fact]
    children: list[tuple[str, nn.Module]]
    tensors: list[Tensor]
    shapes: list[torch.Size]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    options: tuple[float, int, float]
    asks: dict[str, Any]
    sinks: Tensor | None
    multiplier: float
    angles: int
    causal: bool
    scale: Any
    offers: dict[Any, Any]


class LayerParts:
    """The modules of a layer, those that its family's file names among them.

    Holds them, not the layer, so that it is freed with its last user. `gone`: one of them has been
    replaced, and the layer is Transformers' own from then on.
    """

    def __init__(self, layer: nn.Module, form: DecoderLayer) -> None:
        self.form, self.kind = form, type(layer)
        attention, mlp = layer.get_submodule(form.attention), layer.get_submodule(form.mlp)
        named = [name for name in (form.gate, form.up, form.down) if name is not None]
        own = not all(hasattr(mlp, name) for name in (*named, form.activation))
        # an MLP that is not described, and runs as the module that it is
        self.own_mlp: Any = mlp if own else None
        # by the index of the parent (0: the layer) and the name there, every module inside
        self.modules: list[tuple[int, str, nn.Module, type]] = []
        self._add(layer, 0)
        self.gone = False
        norms = (form.before_attention, form.after_attention, form.before_mlp, form.after_mlp)
        self.attention: Any = attention
        self.norms = [None if name is None else layer.get_submodule(name) for name in norms]
        self.qkv = [attention.get_submodule(name) for name in form.qkv]
        self.out: Any = attention.get_submodule(form.out)
        # some families have them by an option of the config
        head_norms = [name for name in form.head_norms or () if hasattr(attention, name)]
        self.head_norms = [attention.get_submodule(name) for name in head_norms]
        self.mlp = [] if own else [mlp.get_submodule(name) for name in dict.fromkeys(named)]
        self.activation = None if own else mlp.get_submodule(form.activation)
        self._weighted: list[nn.Module] = [
            *filter(None, (*self.norms, *self.head_norms)),
            *(*self.qkv, self.out, *self.mlp),
        ]
        self._names = [parameters_of(module) for module in self._weighted]
        self.arguments: Arguments | None = None
        self._watch: _Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arguments": None, "_watch": None}

    def _add(self, parent: nn.Module, index: int) -> None:
        for name, module in parent.named_children():
            self.modules.append((index, name, module, type(module)))
            if module is not self.own_mlp:
                self._add(module, len(self.modules))

    def obstacle(self) -> str | None:
        """Why the operators do not compute what these modules do, whatever their numbers."""
        activation = type(self.activation).__name__
        if self.own_mlp is None and activation not in ACTIVATIONS:
            return f"no kernel has the activation {activation}"
        if self.own_mlp is not None and self.form.parallel:
            return f"{type(self.own_mlp).__name__} runs beside attention"
        for module in (*self.qkv, self.out, *self.mlp):
            if type(module) not in (nn.Linear, PackedLinear):
                return f"{type(module).__name__} multiplies in its own way"
        for stage in (self.qkv, self.mlp[:-1]):
            if len({type(module) for module in stage}) > 1:
                return "some of the weights of one input are packed and others not"
        for *_, kind in self.modules:
            known = kind.__module__.startswith(("transformers.", "torch.nn.modules."))
            if not known and kind is not PackedLinear:
                return f"{kind.__name__} is not a class of Transformers"
        return None

    def now(self, layer: nn.Module) -> Arguments | None:
        """The arguments; None where a module is another one, or somebody's is between them."""
        watch = self._watch
        if watch is None:
            watch = self._watch = _Watch(self.modules)
        if type(layer) is not self.kind or not watch.untouched():
            return None
        made = self.arguments
        if made is not None and made.scale is _scale(layer, self.form):
            for own, key, value in made.facts:
                if own.get(key, _ABSENT) is not value:
                    break
            else:
                there = all(layer._modules.get(name) is module for name, module in made.children)
                if there and [tensor.shape for tensor in made.tensors] == made.shapes:
                    return made
        known = [layer]
        for parent, name, module, _ in self.modules:
            if known[parent]._modules.get(name) is not module:
                self.gone = True
                return None
            known.append(module)
        try:
            made = self._made(layer)
        except Unfit:
            made = None
        self.arguments = made  # whole, at once: other threads may be looking
        return made

    def _made(self, layer: nn.Module) -> Arguments:
        """The arguments as the layer is now.

        Raises:
            Unfit: they do not describe it.
        """
        form, facts, tensors = self.form, list[Fact](), list[Tensor]()
        children, known = [], [layer]
        for parent, name, module, _ in self.modules:
            if parent > 0:
                facts.append((known[parent]._modules, name, module))
            else:  # a dict of the layer itself would keep it alive
                children.append((name, module))
            known.append(module)
        for each in {type(module) for module in known}:
            facts.append(_first_seen(next(c for c in each.__mro__ if "forward" in vars(c))))
        facts.append(_first_seen(functional, "linear"))
        rotation = sys.modules[type(self.attention).__module__]
        facts.append(_first_seen(rotation, "apply_rotary_pos_emb"))
        if any(own.get(name, _ABSENT) is not value for own, name, value in facts):
            raise Unfit("another library has replaced what its classes do")
        for module, names in zip(self._weighted, self._names, strict=True):
            if parameters_of(module) != names:
                raise Unfit("a weight is not a parameter any more, or a new one")

        def fact(own: Mapping[str, Any], key: str) -> Any:
            value = own.get(key, _ABSENT)
            facts.append((own, key, value))
            return None if value is _ABSENT else value

        def pair(module: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
            """Weight and bias of a norm or a product; None for what is not there."""
            if module is None:
                return None, None
            packed = type(module) is PackedLinear
            weight = fact(
                *((module._buffers, "packed") if packed else (module._parameters, "weight"))
            )
            bias = fact(module._parameters, "bias")
            tensors.extend(tensor for tensor in (weight, bias) if tensor is not None)
            return weight, bias

        def eps(norm: nn.Module | None) -> float:
            """What a norm adds below its root."""
            if norm is None:
                return 0.0
            own = norm.__dict__
            return _number(fact(own, "variance_epsilon" if "variance_epsilon" in own else "eps"))

        first, *rest = self.norms
        kind = NORMS[form.norm]
        head_eps = {eps(norm) for norm in self.head_norms} or {0.0}
        query_norm, key_norm = (pair(norm)[0] for norm in self.head_norms or (None, None))
        qkv, own = [pair(module) for module in self.qkv], self.attention.__dict__
        dim = fact(own, "head_dim")
        if len(head_eps) > 1 or type(dim) is not int:
            raise Unfit("no one eps of the heads' norms, or no head_dim")
        width, inside = weight_sizes(weight_of(self.out))
        heads = inside // dim
        rows = sum(0 if weight is None else weight.shape[0] for weight, _ in qkv) // dim
        sizes: list[tuple[nn.Module | None, int]] = [(norm, width) for norm in self.norms]
        # norms of each head, or of all at once
        whole = query_norm is not None and query_norm.shape == (heads * dim,)
        counts = (heads, (rows - heads) // 2) if whole else (1, 1)
        sizes += [(norm, n * dim) for norm, n in zip(self.head_norms, counts, strict=False)]
        if any(t is not None and t.shape != (size,) for norm, size in sizes for t in pair(norm)):
            raise Unfit("a norm is not of the size of what it is given")
        scale = _scale(layer, form)
        before = (
            *(0 if first is None else kind, *pair(first), eps(first)),
            *([weight for weight, _ in qkv], [bias for _, bias in qkv]),
            *(heads, (rows - heads) // 2, dim),
            *(kind if self.head_norms else 0, query_norm, key_norm, head_eps.pop()),
        )
        multiplier = 1.0 if form.scale is None else _number(scale)
        kinds = [0 if norm is None else kind for norm in rest]
        weights = [pair(module) for module in (self.out, *self.mlp)]
        after: tuple[Any, ...]
        if self.activation is None:
            sums = (
                (of, *pair(norm), eps(norm)) for of, norm in zip(kinds[:2], rest[:2], strict=True)
            )
            after = (*weights[0], *(each for of in sums for each in of), multiplier)
        else:
            fact(self.activation.__dict__, "act")
            after = (
                *([weight for weight, _ in weights], [bias for _, bias in weights]),
                *(form.gate is not None, *kinds),
                [tensor for norm in rest for tensor in pair(norm)],
                *map(eps, rest),
                *(ACTIVATIONS[type(self.activation).__name__], form.parallel, multiplier),
            )
        asks = {"scaling": fact(own, "scaling"), "sliding_window": None}
        if form.window:
            asks["sliding_window"] = fact(own, "sliding_window")
            if "sliding_window" not in own:
                asks["sliding_window"] = fact(self.attention.config.__dict__, "sliding_window")
        asks["softcap"] = None if form.softcap is None else fact(own, form.softcap)
        sinks = None if form.sinks is None else fact(self.attention._parameters, form.sinks)
        if form.sinks is not None and sinks is None:
            raise Unfit("its sinks are gone")
        if sinks is not None:
            asks["s_aux"] = sinks
            tensors.append(sinks)
        rotates = form.rotates is None or bool(fact(own, form.rotates))
        window = asks["sliding_window"] or 0
        if type(window) is not int:
            raise Unfit("the window is no whole number")
        return Arguments(
            facts=facts,
            children=children,
            tensors=tensors,
            shapes=[tensor.shape for tensor in tensors],
            before=before,
            after=after,
            options=(_number(asks["scaling"]), window, _number(asks["softcap"] or 0.0)),
            asks=asks,
            sinks=sinks,
            multiplier=multiplier,
            angles=angles_of(self.attention.config, dim, form) if rotates else 0,
            causal=fact(own, "is_causal") is True,
            scale=scale,
            offers={},
        )


_TRAINING, _HOOKS, _PRE_HOOKS = map(
    itemgetter, ("training", "_forward_hooks", "_forward_pre_hooks")
)


class _Watch:
    """Modules that are looked at before every call of their layer, mostly in loops of C."""

    def __init__(self, modules: list[tuple[int, str, nn.Module, type]]) -> None:
        self.modules = [module for _, _, module, _ in modules]
        self.kinds = [kind for *_, kind in modules]
        self.dicts = [module.__dict__ for module in self.modules]
        self.forwards = list[Any]()

    def untouched(self) -> bool:
        """Whether none is trained, of another class, hooked, or has somebody's `forward`."""
        dicts = self.dicts
        if any(map(_TRAINING, dicts)) or list(map(type, self.modules)) != self.kinds:
            return False
        forwards = [own.get("forward") for own in dicts]
        if any(map(_HOOKS, dicts)) or any(map(_PRE_HOOKS, dicts)) or forwards != self.forwards:
            if any(map(is_touched, self.modules)):
                return False
            self.forwards = forwards
        return True


# What classes and modules held under a name when a layer was first read: other libraries put
# functions of their own there, for all models.
_FIRST: dict[tuple[Any, str], Any] = {}


def _first_seen(of: Any, name: str = "forward") -> Fact:
    own = vars(of)
    return own, name, _FIRST.setdefault((of, name), own.get(name, _ABSENT))


def _scale(layer: nn.Module, form: DecoderLayer) -> Any:
    return None if form.scale is None else layer.__dict__.get(form.scale)


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise Unfit(f"{value!r} is no number")
    return float(value)


def angles_of(config: Any, dim: int, form: DecoderLayer) -> int:
    """The angles that the model's rotary embedding gives for a position."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    rotated = int(dim * (1.0 if factor is None else factor))
    return rotated // 2 if form.rotation == "halves once" else rotated
