"""A tuned checkpoint: a converted one, taught by its original, and written in its own dtype."""

from pathlib import Path

from torch import Tensor

from headwise.base.progress import Progress
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.weights import ShardWriter, in_attention
from headwise.conversion.checkpoint.workspace import Workspace
from headwise.conversion.tuning.distillation import Tuning, distil

# How often the state of a tuning is written.
_SAVE_SECONDS = 120.0


def write_tuned(
    original: Checkpoint,
    workspace: Workspace,
    tokens: Tensor,
    steps: int,
    part: Path,
    progress: Progress,
) -> None:
    """Tune the converted checkpoint of the workspace into the empty folder `part`.

    Args:
        workspace: holds the state, too, that an interrupted tuning resumes from.
        tokens: [T, S], sequences to learn from.
    """
    converted = workspace.converted
    student = converted.load(progress, dtype="float32")
    distil(
        original.load(progress),
        student,
        tokens,
        Tuning(steps),
        folder=workspace.tuning,
        save_seconds=_SAVE_SECONDS,
        progress=progress,
    )
    new, writer = student.state_dict(), ShardWriter(part)
    for name in converted.weights:
        tensor = converted.weights[name]
        writer.add(name, new[name].to(tensor.dtype) if in_attention(name) else tensor)
    writer.close()
    workspace.copy_to(part)
