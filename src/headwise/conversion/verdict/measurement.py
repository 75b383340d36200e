"""The measured part of a verdict: the quality and the decode speed of checkpoints."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from headwise.base.files import reason
from headwise.base.progress import Progress
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.verdict.quality import Judge
from headwise.conversion.verdict.speed import Speeds, compare_speed
from headwise.conversion.verdict.verdict import Verdict
from headwise.errors import HeadwiseError


def judged(
    verdict: Verdict,
    original: Checkpoint,
    results: dict[str, Checkpoint],
    held_out: Tensor,
    progress: Progress,
) -> Verdict:
    """The verdict with the quality of each model; one model is in memory at a time.

    Args:
        results: the converted checkpoint and, where there was a tuning, the tuned one, by name.
        held_out: [M, S], tokens that nothing was fitted to.

    Raises:
        ConversionError: logits that are not numbers.
    """
    model = original.load(progress)
    judge = Judge(model, original.tokenizer, held_out, progress)
    del model
    fields: dict[str, Any] = {
        name: judge.judge(result.load(progress), name) for name, result in results.items()
    }
    fields |= {"prompt": judge.prompt, "positions": judge.positions, "original": judge.original}
    return replace(verdict, **fields)


def timed(
    verdict: Verdict, original: Checkpoint, converted: Checkpoint, progress: Progress
) -> Verdict:
    """The verdict with the speeds; that they cannot be measured is no reason to lose the result."""
    try:
        speeds = compare_speed(original, converted, progress=progress)
    except (HeadwiseError, RuntimeError) as error:
        cause = reason(error).replace(f"{original.folder.parent}/", "")
        speeds = Speeds(note=f"decode speed was not measured: {cause}")
    return replace(verdict, speeds=speeds)
