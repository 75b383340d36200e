"""What a conversion cost and gained, as data that is written as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from headwise.conversion.target import Target
from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.speed import DecodeSpeed, Speeds
from headwise.measure.environment import environment
from headwise.measure.timing import Ratio
from headwise.spec import ModelSpec

# A conversion that multiplies perplexity by more than this is not usable.
_USABLE = 2.0


@dataclass(frozen=True)
class CacheCost:
    """Bytes that a token adds to the cache of all layers, in the checkpoint's dtype.

    >>> cost = CacheCost(original=23040, converted=7680, dtype="bfloat16")
    >>> f"{cost.share:.0%}"
    '33%'
    """

    original: int
    converted: int
    dtype: str

    @classmethod
    def between(cls, original: Any, converted: Any) -> "CacheCost":
        """Counted from two Transformers configs.

        Raises:
            SpecError: a config that cannot be read.
        """
        dtype = original.dtype if original.dtype is not None else "float32"
        before, after = (
            ModelSpec.from_config(config).cache_bytes_per_token(dtype)
            for config in (original, converted)
        )
        return cls(before, after, str(dtype).removeprefix("torch."))

    @property
    def share(self) -> float:
        """How much of the original's cache the converted one is."""
        return self.converted / self.original


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One conversion: what it was, what it cost, what it gained.

    Args:
        model: the original's name.
        base_model: its id on the hub, None where it is not from there.
        model_type: the result's.
        target: as `Target` writes itself.
        method: "aware" of the activations, or "naive".
        cache: before and after.
        prompt: the held-out text that each `Quality` continues; "" where quality is not measured.
        positions: how many held-out tokens were predicted.
        original, converted, tuned: quality of each, None where it was not measured or not made.
        layer_errors: after each layer's attention, the relative squared error of the normalised
            hidden states on text that nothing was fitted to.
        speeds: decoding before and after.
        command: what repeats this.
        seconds: that the whole took.
        environment: versions and machine.
    """

    model: str
    model_type: str
    target: str
    method: str
    cache: CacheCost
    speeds: Speeds
    command: str
    seconds: float
    base_model: str | None = None
    prompt: str = ""
    positions: int = 0
    original: Quality | None = None
    converted: Quality | None = None
    tuned: Quality | None = None
    layer_errors: tuple[float, ...] = ()
    environment: dict[str, Any] = field(default_factory=environment)

    @property
    def title(self) -> str:
        """What was done, in words: "SmolLM2-135M to mqa"."""
        return f"{self.model} to {self.target}"

    @property
    def qualities(self) -> dict[str, Quality]:
        """The quality of each model that was measured, by the model's name."""
        models = {"original": self.original, "converted": self.converted, "tuned": self.tuned}
        return {name: quality for name, quality in models.items() if quality is not None}

    def factor(self, quality: Quality | None) -> float | None:
        """How many times the original's perplexity a model's is; None where it is not known."""
        if quality is None or self.original is None:
            return None
        return quality.perplexity / self.original.perplexity

    @property
    def conclusion(self) -> str:
        """The verdict in one line."""
        share = f"{self.target} keeps {self.cache.share:.0%} of the cache"
        if self.cache.share > 1:
            share = f"{self.target} takes {self.cache.share:.1f} times the cache"
        final = self.tuned or self.converted
        factor = self.factor(final)
        if final is None or factor is None:
            if not Target.parse(self.target).exact:
                return f"{share}; quality was not measured"
            return (
                f"{share}; quality was not measured, but nothing is dropped: "
                "the logits equal the original's by construction"
            )
        if factor > _USABLE:
            tune = "tune it (--tune)" if self.tuned is None else "tune it longer (--tune)"
            return (
                f"{self.target} multiplies perplexity by {factor:,.1f}: not usable as it is; "
                f"{tune} or keep more of the cache"
            )
        return (
            f"{share}, multiplies perplexity by {factor:.2f} and agrees with the original on "
            f"{final.agreement:.1%} of likeliest tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the conclusion; times in seconds, sizes in bytes."""
        return asdict(self) | {"conclusion": self.conclusion}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Verdict":
        """What `to_dict` made, also after it was JSON."""
        fields = {name: value for name, value in data.items() if name != "conclusion"}
        for name in ("original", "converted", "tuned"):
            fields[name] = data[name] and Quality(**data[name])
        contexts = [
            DecodeSpeed(**speed | {"ratio": Ratio(**speed["ratio"])})
            for speed in data["speeds"]["contexts"]
        ]
        fields["cache"] = CacheCost(**data["cache"])
        fields["layer_errors"] = tuple(data["layer_errors"])
        fields["speeds"] = Speeds(**data["speeds"] | {"contexts": tuple(contexts)})
        return cls(**fields)
