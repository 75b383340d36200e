"""What a conversion aims at: the mechanism, and how much of the cache is kept."""

import re
from dataclasses import dataclass
from typing import Literal

from headwise.errors import OptionError

_EXPECTED = (
    "expected gqa:2 (2 kv heads), mqa, mla (everything kept), mla:50% (of the cache), "
    "mla:rank=128,rope=48, or mha (from MLA)"
)
_LATENT = re.compile(r"mla:rank=(\d{1,6}),rope=(\d{1,6})")
_SHARE = re.compile(r"mla:(\d{1,3}(?:\.\d+)?)%")
_GROUPS = re.compile(r"gqa:(\d{1,4})")


@dataclass(frozen=True)
class Target:
    """A mechanism with its sizes.

    Args:
        mechanism: "gqa" (MQA is one kv head), "mla", or "mha" from MLA.
        kv_heads: for "gqa".
        rank, rope_dim: R and P of every layer, for "mla"; None where `share` says it.
        share: of the elements that the original caches, for "mla"; 1 keeps everything, exactly.
    """

    mechanism: Literal["gqa", "mla", "mha"]
    kv_heads: int | None = None
    rank: int | None = None
    rope_dim: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read what the command and the function take.

        >>> Target.parse("mqa").kv_heads, Target.parse("mla:50%").share, str(Target.parse("gqa:2"))
        (1, 0.5, 'gqa:2')

        Raises:
            OptionError: anything else.
        """
        word = text.strip().lower() if isinstance(text, str) else ""
        if word == "mqa":
            return cls("gqa", kv_heads=1)
        if word == "mha":
            return cls("mha")
        if word == "mla":
            return cls("mla", share=1.0)
        if (match := _GROUPS.fullmatch(word)) and int(match[1]) > 0:
            return cls("gqa", kv_heads=int(match[1]))
        if (match := _SHARE.fullmatch(word)) and 0 < float(match[1]) <= 100:
            return cls("mla", share=float(match[1]) / 100)
        if match := _LATENT.fullmatch(word):
            rank, rope = map(int, match.groups())
            if rank > 0 and rope > 0 and rope % 2 == 0:
                return cls("mla", rank=rank, rope_dim=rope)
            raise OptionError(
                f"to is {text!r}: expected a rank of at least 1 and an even rope of at least 2"
            )
        raise OptionError(f"to is {text!r}: {_EXPECTED}")

    @property
    def exact(self) -> bool:
        """Whether the result has the original's logits."""
        return self.mechanism == "mha" or self.share == 1.0

    def __str__(self) -> str:
        if self.mechanism == "gqa":
            return "mqa" if self.kv_heads == 1 else f"gqa:{self.kv_heads}"
        if self.mechanism == "mha" or self.share == 1.0:
            return self.mechanism
        if self.share is not None:
            return f"mla:{100 * self.share:g}%"
        return f"mla:rank={self.rank},rope={self.rope_dim}"
