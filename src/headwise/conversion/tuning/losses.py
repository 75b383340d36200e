"""The loss of a model that is taught another's outputs, and its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

# Positions whose logits are in memory at once: six float32 copies or so, 150 MB at 49152 tokens.
_SLICE = 128


def backward(
    teacher: Any, student: Any, tokens: Tensor, attention_weight: float
) -> tuple[float, float]:
    """Add the gradients of both losses on tokens [B, S] to the student's parameters.

    Returns:
        KL(teacher || student) in nats per token, the mean over all positions (Hinton et al. 2015,
        arXiv 1503.02531); and the squared error of the o_proj outputs as a share of the teacher's
        squares, the mean over layers, which counts `attention_weight` times.
    """
    # not inference mode, whose tensors cannot take part in a backward pass
    with torch.no_grad(), _attention_outputs(teacher) as wanted:
        target = teacher.model(tokens, use_cache=False)[0]
    with torch.enable_grad(), _attention_outputs(student) as got:
        hidden = student.model(tokens, use_cache=False)[0]
        errors = [_relative_error(*pair) for pair in zip(got, wanted, strict=True)]
        attention = torch.stack(errors).mean()
    divergence, slope = _divergence(teacher.lm_head, student.lm_head, target, hidden)
    torch.autograd.backward([hidden, attention_weight * attention], [slope, None])
    return divergence, attention.item()


def _divergence(
    teacher_head: Any, student_head: Any, target: Tensor, hidden: Tensor
) -> tuple[float, Tensor]:
    """KL of the logits from both last hidden states [B, S, E], and its gradient for `hidden`."""
    count = hidden[..., 0].numel()
    total, slopes = 0.0, []
    pairs = zip(target.flatten(0, 1).split(_SLICE), hidden.flatten(0, 1).split(_SLICE))
    for wanted, got in pairs:
        leaf = got.detach().requires_grad_()
        with torch.no_grad():
            expected = teacher_head(wanted).float().log_softmax(-1)
        with torch.enable_grad():
            actual = student_head(leaf).float().log_softmax(-1)
            loss = kl_div(actual, expected, reduction="sum", log_target=True) / count
        loss.backward()
        total += loss.item()
        slopes.append(leaf.grad)
    return total, torch.cat(slopes).view_as(hidden)


def _relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return (got.float() - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)


@contextmanager
def _attention_outputs(model: Any) -> Iterator[list[Tensor]]:
    """While open, what each layer's o_proj puts out, [B, S, E], is added to the list."""
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for layer in model.model.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
