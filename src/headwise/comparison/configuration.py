"""Everything that determines what a comparison finds, as data that is checked and kept with it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from headwise.comparison.mixers import Mixer, mixers
from headwise.errors import OptionError
from headwise.spec import AttentionSpec
from headwise.spec.mechanism import mechanism_name

DEFAULT = ("mha", "gqa:2", "mqa", "mla")
TaskName = Literal["recall", "beyond", "text"]
Equal = Literal["parameters", "bytes"]
# Pairs in a sequence, where none are given.
_PAIRS = {"recall": 32, "beyond": 8, "text": 32}
# Of how many tokens of the longest sequence a window is one, where its name does not say.
_WINDOWS = 8
# The least that an integer of the configuration can be.
_LEAST = dict.fromkeys(("steps", "seeds", "width", "heads", "layers", "pairs"), 1)
_LEAST |= {"vocabulary": 4, "length": 2, "batch": 1, "threads": 1}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is trained, on what, and how.

    >>> Configuration(width=64, heads=8).head_dim
    8

    Args:
        mechanisms: names of attention as `with_mechanism` takes them ("gqa-2" becomes "gqa:2"), of
            states ("gated-delta", "kda", "ssd", "retention"), "topk:16" (mha whose queries get 16
            keys), "window:16" (mha in a window; "window": an eighth of the longest sequence),
            "memory:16" (the same and a memory of the rest) and "hybrid:3-1", three layers of
            gated-delta and one of mha, repeated.
        task: "recall", "beyond" (the same over a distance) or "text".
        steps: of training, a run.
        seeds: runs of each mechanism, with the seeds 0, 1, ...
        width: E of the decoder.
        heads: query heads of E / heads dims each.
        layers: blocks of the decoder.
        pairs: of a key and its value in a sequence of recall (32 by default) or beyond (8).
        vocabulary: tokens of recall and beyond, half of them keys and half values.
        length: tokens of a training sequence of text, or of the longest of beyond.
        text: SHA-256 of the file's bytes, for the task text.
        batch: tokens of a training step.
        learning_rate: its highest.
        threads: that PyTorch computes with; another number rounds otherwise.
        equal: "parameters", which all decoders have as many of, or "bytes": then every layer also
            holds a quarter of the bytes that MHA would hold of the longest sequence, to an eighth.

    Raises:
        OptionError: a value out of its range, or one that does not fit the others.
    """

    mechanisms: tuple[str, ...] = DEFAULT
    task: TaskName = "recall"
    steps: int = 1600
    seeds: int = 1
    width: int = 64
    heads: int = 8
    layers: int = 2
    # Typed as what readers see: None never outlives __post_init__.
    pairs: int = None  # type: ignore[assignment]
    vocabulary: int = 128
    length: int = 128
    text: str | None = None
    batch: int = 2048
    learning_rate: float = 2e-3
    threads: int = 1
    equal: Equal = "parameters"

    def __post_init__(self) -> None:
        if self.task not in get_args(TaskName):
            raise OptionError(f"task is {self.task!r}, expected recall, beyond or text")
        if self.equal not in get_args(Equal):
            raise OptionError(f"equal is {self.equal!r}, expected parameters or bytes")
        if (self.task == "text") != (self.text is not None):
            raise OptionError(
                f"task is {self.task} {'without' if self.text is None else 'with'} a text file; "
                "a text file goes with the task text, and with it only"
            )
        if self.pairs is None:
            object.__setattr__(self, "pairs", _PAIRS[self.task])
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} is {value!r}, expected an integer of at least {least}")
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < 1:
            raise OptionError(f"learning_rate is {self.learning_rate!r}, expected between 0 and 1")
        if self.width % (4 * self.heads):
            raise OptionError(
                f"width is {self.width}, and {self.heads} heads need a multiple of "
                f"{4 * self.heads}: the dims of a head, and half of them, are rotated in pairs"
            )
        object.__setattr__(self, "mechanisms", tuple(map(mechanism_name, self.mechanisms)))
        if not self.mechanisms:
            raise OptionError("mechanisms is empty; expected some, as mha,gqa:2,mqa,mla")
        names: dict[tuple[Mixer, ...], str] = {}
        for name in self.mechanisms:
            layers = self.mixers(name)
            if layers in names:
                raise OptionError(f"mechanisms: {name} is the same as {names[layers]}")
            names[layers] = name
        self._check_sequences()

    def _check_sequences(self) -> None:
        if self.task != "text" and self.vocabulary < 2 * self.pairs + 2:
            raise OptionError(
                f"vocabulary is {self.vocabulary}, and {self.pairs} pairs need at least "
                f"{2 * self.pairs + 2}: half of it are keys, which differ within a sequence"
            )
        if self.task == "beyond" and self.length < 16 * self.pairs:
            raise OptionError(
                f"length is {self.length}, and {self.pairs} pairs need at least {16 * self.pairs}: "
                "most of a sequence lies between the pairs and the questions"
            )
        if self.batch < self.tokens:
            raise OptionError(
                f"batch is {self.batch} tokens, expected at least the {self.tokens} of a sequence"
            )

    @property
    def head_dim(self) -> int:
        """D, dims of a head."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return 4 * self.pairs if self.task == "recall" else self.length

    @property
    def plain(self) -> AttentionSpec:
        """The layer of MHA by which all decoders are measured."""
        heads, dim = self.heads, self.head_dim
        return AttentionSpec(heads=heads, kv_heads=heads, head_dim=dim, value_dim=dim)

    def mixers(self, mechanism: str) -> tuple[Mixer, ...]:
        """What each layer mixes its tokens by.

        Raises:
            OptionError: an unknown mechanism, or one that these heads and layers cannot have.
        """
        tokens = self.tokens if self.equal == "bytes" else None
        window = max(1, self.tokens // _WINDOWS)
        return mixers(self.plain, mechanism, self.layers, tokens, window)

    def sequence_bytes(self, mechanism: str) -> int:
        """Bytes that all layers hold of the longest sequence, in float32."""
        layers = self.mixers(mechanism)
        return sum(layer.cache_bytes(self.tokens, dtype="float32") for layer in layers)

    def settings(self) -> dict[str, Any]:
        """What this task reads, as JSON has it."""
        unread = {
            "recall": ("length", "text"),
            "beyond": ("text",),
            "text": ("pairs", "vocabulary"),
        }[self.task]
        read = {name: value for name, value in asdict(self).items() if name not in unread}
        return read | {"mechanisms": list(self.mechanisms)}
