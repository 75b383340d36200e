"""One run: a decoder trained from a seed, and judged on what it has not seen."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.comparison.configuration import Configuration
from headwise.comparison.models import build
from headwise.comparison.task import IGNORED, Batch, Task
from headwise.nn import Decoder

_POINTS = 10
_WARMUP = 0.05
_LAST = 0.1


@dataclass(frozen=True)
class Point:
    """On the way: the steps done, and loss and accuracy then."""

    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """A mechanism trained with a seed.

    `loss` (nats per token) and `accuracy` (share of tokens) are of the held-out data at the end,
    `curve` of its first batch on the way there. The same configuration and seed give the same
    numbers on the same machine and version of PyTorch.
    """

    mechanism: str
    seed: int
    loss: float
    accuracy: float
    curve: tuple[Point, ...]


def train(
    configuration: Configuration,
    task: Task,
    mechanism: str,
    seed: int,
    *,
    progress: Callable[[int], object] = lambda step: None,
) -> Run:
    """Train one decoder; every mechanism sees the same batches for a seed.

    `progress` is called with the steps done. Gradients are clipped to a norm of 1, the learning
    rate rises for 1/20 of the steps and falls to 1/10 of its height as a cosine.
    """
    model = build(configuration, mechanism, seed)
    optimizer = new_optimizer(model, configuration.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    held_out = task.held_out()
    points = {configuration.steps * point // _POINTS for point in range(1, _POINTS + 1)}
    curve = []
    for step in range(configuration.steps):
        for group in optimizer.param_groups:
            group["lr"] = configuration.learning_rate * schedule(step, configuration.steps)
        train_step(model, optimizer, task.batch(step, generator))
        if step + 1 in points:
            curve.append(Point(step + 1, *judge(model, held_out[:1])))
        progress(step + 1)
    loss, accuracy = judge(model, held_out)
    return Run(mechanism, seed, loss, accuracy, tuple(curve))


def new_optimizer(model: Decoder, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )


def train_step(model: Decoder, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward and one step of the optimizer."""
    optimizer.zero_grad()
    model.clear_memory()
    _loss(model(batch.tokens), batch.targets, "mean").backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def judge(model: Decoder, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy over the tokens that are asked."""
    loss, right, asked = 0.0, 0, 0
    for batch in batches:
        model.clear_memory()
        logits = model(batch.tokens)
        loss += _loss(logits, batch.targets, "sum").item()
        wanted = batch.targets != IGNORED
        right += int((logits[wanted].argmax(dim=-1) == batch.targets[wanted]).sum())
        asked += int(wanted.sum())
    return loss / asked, right / asked


def schedule(step: int, steps: int) -> float:
    """The share of the highest learning rate that a step (from 0) takes.

    >>> [round(schedule(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.54, 0.1]
    """
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup + 1) / max(1, steps - warmup)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * done))


def _loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )
