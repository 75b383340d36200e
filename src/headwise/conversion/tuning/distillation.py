"""Distillation: a converted model is taught to give the original's outputs."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import one_line
from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.weights import in_attention, write_weights
from headwise.conversion.checkpoint.workspace import Workspace
from headwise.conversion.tuning.losses import backward
from headwise.conversion.tuning.optimizer import ScaledAdam
from headwise.conversion.tuning.states import Losses, TuningFolder, digest
from headwise.errors import ConversionError, OptionError

# How often progress updates the divergence: in a log each change of the text is a line.
_POINTS = 10
# How often the state of a tuning is written.
_SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Args:
        steps: of the optimizer.
        batch: sequences per step.
        learning_rate: at its height, the share of its own root mean square that a parameter moves
            in a step. One value so fits models of any width, and latents of any scale.
        attention_weight: of the attention's errors, beside the divergence in nats.
        seed: of the order of the sequences.

    Raises:
        OptionError: a value outside its range.
    """

    steps: int
    batch: int = 1
    learning_rate: float = 1e-3
    attention_weight: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate is {self.learning_rate}, expected more than 0")
        if not 0 <= self.attention_weight < math.inf:
            raise OptionError(f"attention_weight is {self.attention_weight}, expected at least 0")


def write_tuned(
    original: Checkpoint,
    workspace: Workspace,
    tokens: Tensor,
    steps: int,
    part: Path,
    progress: Progress,
) -> None:
    """Tune the converted checkpoint of the workspace into the empty folder `part`, in its dtype.

    Args:
        workspace: holds the state, too, that an interrupted tuning resumes from.
        tokens: [T, S], sequences to learn from.
    """
    converted = workspace.converted
    student = converted.load(progress=progress, dtype="float32")
    distil(
        original.load(progress=progress),
        student,
        tokens,
        Tuning(steps),
        folder=workspace.tuning,
        save_seconds=_SAVE_SECONDS,
        progress=progress,
    )
    new, stored = student.state_dict(), converted.weights
    write_weights(
        part,
        (
            (name, new[name].to(stored[name].dtype) if in_attention(name) else stored[name])
            for name in stored
        ),
    )
    workspace.copy_to(part)


def distil(
    teacher: Any,
    student: Any,
    tokens: Tensor,
    tuning: Tuning,
    *,
    trained: Callable[[str], bool] = in_attention,
    folder: Path | None = None,
    save_seconds: float = _SAVE_SECONDS,
    progress: Progress = silent,
) -> list[Losses]:
    """Train `student`, in place, to give the outputs of `teacher` on a text.

    The loss is KL(teacher || student) at every position (Hinton et al. 2015, arXiv 1503.02531) and
    `attention_weight` times the relative squared error of the outputs of each layer's o_proj. Adam
    in float32, whatever the student's dtype; its rate rises for 1/10 of the steps, and falls to 0
    as a cosine. Each sequence is met once before any is met again.

    In memory beside both models: for each trained parameter 12 bytes (gradient and two moments), 16
    where the student is not in float32; what the student's backward pass needs of a batch; the
    teacher's o_proj outputs, [B, S, E] per layer; and the logits of 128 positions, some six float32
    copies.

    Args:
        teacher, student: Transformers decoders built as Llama is, on one device, with one
            vocabulary. Both are left in eval mode.
        tokens: int64 [N, S], the sequences.
        tuning: how.
        trained: which parameters of the student, by name; the others stay as they are.
        folder: for the state, which is written at most every `save_seconds` and at the end. The
            same call resumes from there after an interruption, and ends with the same bits as
            without one; `student` has to be as it was before the first step. The folder is the
            caller's to remove.
        save_seconds: see `folder`.
        progress: told of every step.

    Returns:
        the two losses of each step, before it changed anything.

    Raises:
        OptionError: nothing to train, or `folder` is of another tuning; says what differs.
        ConversionError: a loss that is not finite; the student then has the last step's weights.
        LoadError: `folder` cannot be read or written.
    """
    assert tokens.ndim == 2
    assert tokens.numel() > 0
    parameters = {
        name: parameter
        for name, parameter in student.named_parameters()
        if trained(name) and parameter.numel()
    }
    if not parameters:
        raise OptionError("no parameter of the model is to be trained; choose some with `trained`")
    for model in (teacher, student):
        model.eval()
    adam = ScaledAdam(parameters, tuning.learning_rate, tuning.steps)
    states = None
    losses: list[Losses] = []
    if folder is not None:
        data = {
            "teacher": teacher.state_dict(),
            "student": student.state_dict(),
            "tokens": {"tokens": tokens},
        }
        digests = {name: digest(tensors) for name, tensors in data.items()}
        states = TuningFolder(folder, asdict(tuning) | digests)
        if state := states.newest():
            losses, tensors = state
            with one_line(f"{folder} holds no state of this tuning; remove it to restart"):
                adam.restore(tensors, len(losses))
    order = _order(len(tokens), tuning)
    saved = monotonic()
    with _gradients_for(student, parameters.values()):
        for step in range(len(losses), tuning.steps):
            progress(_stage(losses, tuning.steps), step, tuning.steps)
            ids = tokens[order[step]].to(student.device)
            loss = backward(teacher, student, ids, tuning.attention_weight)
            if not (all(map(math.isfinite, loss)) and adam.step()):
                raise ConversionError(
                    f"tuning stopped at step {step + 1} of {tuning.steps}: the loss or its "
                    "gradient is not finite; the converted model cannot be taught as it is"
                )
            losses.append(loss)
            finished = len(losses) == tuning.steps
            if states and (finished or monotonic() - saved >= save_seconds):
                states.write(losses, adam.state())
                saved = monotonic()
    progress(_stage(losses, tuning.steps), tuning.steps, tuning.steps)
    return losses


def _order(count: int, tuning: Tuning) -> Tensor:
    """[steps, batch]: indices of sequences, in a new random order each time all have been met."""
    generator = torch.Generator().manual_seed(tuning.seed)
    needed = tuning.steps * tuning.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(passes)[:needed].view(tuning.steps, tuning.batch)


def _stage(losses: Sequence[Losses], steps: int) -> str:
    """What progress calls the work: with the mean divergence of the last tenth that is whole."""
    part = max(1, steps // _POINTS)
    whole = len(losses) // part * part
    if not whole:
        return "tuning"
    met = fmean(divergence for divergence, _ in losses[whole - part : whole])
    return f"tuning, {met:.3f} nats per token from the original"


@contextmanager
def _gradients_for(model: Any, parameters: Iterable[Tensor]) -> Iterator[None]:
    """While open, these parameters alone require gradients; none are left behind."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.zero_grad()
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
