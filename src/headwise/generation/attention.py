"""Which attention a model runs with, and what that says about its layers."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.errors import OptionError, SpecError, UnsupportedError
from headwise.hf import LayerReport, Remembered, attach, detach
from headwise.spec import ModelSpec

# The folder that a model remembers in; True is the user's own.
Remember = str | Path | bool | Remembered | None
# "dense" is headwise without sparse attention.
ATTENTIONS = ("headwise", "dense", "sdpa", "eager")


@dataclass(frozen=True)
class NotUsed:
    """A backend that did not run, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class BackendLayers:
    """Equal layers of a model: how many, their attention in words, what ran and what did not.

    `cache` is what held the keys, by the names that `headwise.attach` takes; "Transformers" where
    it was not ours.
    """

    count: int
    mechanism: str
    backend: str
    cache: str = "Transformers"
    others: tuple[NotUsed, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} x {self.mechanism} on {self.backend}"


def select_attention(
    model: Any,
    attention: str,
    cache: str = "contiguous",
    *,
    cache_limit: str | int | None = None,
    sparse: str | None = None,
    remember: Remember = None,
    context_parallel: Any = None,
) -> tuple[BackendLayers, ...]:
    """Make a model run with one of ATTENTIONS, whatever it ran with before.

    `cache` and what follows are for headwise, as `headwise.attach` takes them.

    Raises:
        OptionError: another name.
        UnsupportedError: the model does not have that implementation.
    """
    if attention not in ATTENTIONS:
        names = ", ".join(ATTENTIONS)
        raise OptionError(f"attention {attention!r} is unknown; use one of {names}")
    detach(model)
    if attention in ("headwise", "dense"):
        report = attach(
            model,
            cache=cache,
            cache_limit=cache_limit,
            sparse=sparse if attention == "headwise" else "all",
            context_parallel=context_parallel,
            remember=remember,
        )
        layers = Counter(map(_attached, report.layers))
        return tuple(replace(layer, count=count) for layer, count in layers.items())
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} has no {attention} attention in Transformers; use "
            f"{'eager' if attention == 'sdpa' else 'sdpa'} or headwise"
        ) from error
    return tuple(
        BackendLayers(count, words, f"Transformers {attention}")
        for count, words in _layers(model.config)
    )


def _attached(layer: LayerReport) -> BackendLayers:
    """One layer of an AttachReport."""
    accepted = next((verdict for verdict in layer.decode if verdict.accepted), None)
    return BackendLayers(
        1,
        str(layer.spec) if layer.spec is not None else "read at run time",
        accepted.backend if accepted is not None else "headwise, by shape",
        layer.cache,
        tuple(
            NotUsed(verdict.backend, "slower: " * verdict.accepted + verdict.reason)
            for verdict in layer.decode
            if verdict is not accepted
        ),
    )


def _layers(config: Any) -> list[tuple[int, str]]:
    """Each kind of layer that a config has: how many, and its mechanism in words."""
    try:
        groups = ModelSpec.from_config(config).layer_groups()
    except SpecError:
        text = config.get_text_config(decoder=True)
        return [(int(text.num_hidden_layers), f"{text.model_type} (not covered)")]
    return [(len(indices), str(layer)) for layer, indices in groups]
