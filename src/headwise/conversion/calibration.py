"""The calibration text as sequences of tokens: to fit on, to measure errors with, to judge by."""

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
class Calibration:
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

    @classmethod
    def read(cls, file: Path, tokenizer: Any, tokens: int, length: int) -> "Calibration":
        """Cut a text file; every sequence begins as the tokenizer begins a text.

        Raises:
            LoadError: the file cannot be read.
            OptionError: it is too short for the tokens asked for.
        """
        text = read_text(file)
        first = _first_token(tokenizer)
        body = length - len(first)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        available = len(ids) // max(1, body)
        held_out = min(_HELD_OUT_TOKENS // length or 1, (available - _PROBED) // 2)
        count = min(-(-tokens // length), available - _PROBED - held_out)
        if count < 1 or held_out < 1:
            raise OptionError(
                f"{file} holds {len(ids)} tokens, and calibration needs at least "
                f"{(_PROBED + 2) * length}: give a longer text, or sequences shorter than {length}"
            )
        bodies = ids[: available * body].view(available, body)
        begin = torch.tensor(first, dtype=ids.dtype).expand(available, -1)
        sequences = torch.cat([begin, bodies], dim=1)
        return cls(
            fitted=sequences[:count],
            probed=sequences[count : count + _PROBED],
            held_out=sequences[available - held_out :],
            tuned=sequences[: available - held_out],
        )


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, as many do; none in others."""
    with_special = tokenizer("a", verbose=False).input_ids
    begins = with_special and with_special[0] == tokenizer.bos_token_id
    return [int(tokenizer.bos_token_id)] if begins else []
