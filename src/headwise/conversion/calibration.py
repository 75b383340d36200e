"""The calibration text as sequences of tokens: to fit on, to see errors with, and to judge by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import read_text
from headwise.errors import OptionError

# Sequences of which no fit ever sees anything: for layer errors, and for the verdict.
_PROBED = 2
_HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one text.

    Args:
        fitted: [N, S], from its beginning.
        probed: [2, S], after them: what layers lose is measured on these.
        held_out: [M, S], from its end: what the verdict is measured on.
        tuned: [T, S], all that is not held out: what a tuning learns from.
    """

    fitted: Tensor
    probed: Tensor
    held_out: Tensor
    tuned: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest token of all."""
        return torch.maximum(self.tuned.max(), self.held_out.max())

    @classmethod
    def read(cls, file: Path, tokenizer: Any, tokens: int, length: int) -> "Sequences":
        """Cut a text file; every sequence begins as the tokenizer begins a text.

        Raises:
            LoadError: the file cannot be read.
            OptionError: it is too short for the tokens asked for.
        """
        text = read_text(file)
        first = _first_token(tokenizer)
        body = length - len(first)
        found = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        count = -(-tokens // length)
        available = len(found) // max(1, body)
        held_out = min(_HELD_OUT_TOKENS // length or 1, (available - _PROBED) // 2)
        count = min(count, available - _PROBED - held_out)
        if count < 1 or held_out < 1:
            raise OptionError(
                f"{file} holds {len(found)} tokens, and calibration needs at least "
                f"{(_PROBED + 2) * length}: give a longer text, or sequences shorter than {length}"
            )
        cut = found[: available * body].view(available, body)
        begun = torch.cat([torch.tensor(first, dtype=cut.dtype).expand(available, -1), cut], dim=1)
        return cls(
            fitted=begun[:count],
            probed=begun[count : count + _PROBED],
            held_out=begun[available - held_out :],
            tuned=begun[: available - held_out],
        )


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, as many do; none in others."""
    with_special = tokenizer("a", verbose=False).input_ids
    begins = with_special and with_special[0] == tokenizer.bos_token_id
    return [int(tokenizer.bos_token_id)] if begins else []
