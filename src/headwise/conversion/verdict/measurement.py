"""The measured part of a verdict: the quality and the decode speed of checkpoints."""

from typing import Any

from torch import Tensor

from headwise.base.files import reason
from headwise.base.progress import Progress
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.verdict.quality import Judge
from headwise.conversion.verdict.speed import Speeds, compare_speed
from headwise.errors import HeadwiseError


def judged(
    original: Checkpoint, results: dict[str, Checkpoint], held_out: Tensor, progress: Progress
) -> dict[str, Any]:
    """The fields of a verdict that say the quality; one model is in memory at a time.

    Args:
        results: the converted checkpoint and, where there was a tuning, the tuned one, by name.
        held_out: [M, S], tokens that nothing was fitted to.

    Raises:
        ConversionError: logits that are not numbers.
    """
    model = original.load(progress)
    judge = Judge(model, original.tokenizer, held_out, progress)
    del model
    fields = {name: judge.judge(result.load(progress), name) for name, result in results.items()}
    return fields | {name: getattr(judge, name) for name in ("prompt", "positions", "original")}


def timed(original: Checkpoint, converted: Checkpoint, progress: Progress) -> Speeds:
    """Decoding before and after; that it cannot be measured is no reason to lose the result."""
    try:
        return compare_speed(original, converted, progress=progress)
    except (HeadwiseError, RuntimeError) as error:
        cause = reason(error).replace(f"{original.folder.parent}/", "")
        return Speeds(note=f"decode speed was not measured: {cause}")
