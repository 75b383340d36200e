"""Training an attached model: loss and gradients as stock, also with checkpointing and dropout."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import headwise
from families import GENERATORS, KIN, VOCABULARY, all_but_sweep, make

IDS = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(6))
PADDING = torch.ones_like(IDS)
PADDING[0, :4] = 0
LABELS = IDS.masked_fill(PADDING == 0, -100)


def _step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(9)
    loss = model(IDS, labels=LABELS, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", all_but_sweep(GENERATORS, {*KIN} - {"longcat_flash"}))
def test_a_checkpointed_step_has_the_loss_and_gradients_of_stock(family: str, padded: bool) -> None:
    inputs = {"attention_mask": PADDING} if padded else {}
    results = []
    for attach in (False, True):
        model = make(family).train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        if attach:
            headwise.attach(model)
        # stock Falcon gives SDPA rows that hide everything by the lowest number of a float mask,
        # where PyTorch's fused backward pass on a CPU is wrong
        exact = not attach and padded and family == "falcon-rw"
        with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            results.append(_step(model, use_cache=False, **inputs))
    (loss, gradients), (our_loss, ours) = results
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=1e-5)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # float32 rounding of sums over 46 tokens, relative to the largest entry
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * scale + 1e-7, rtol=0)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("llama-gqa", "eager"),
        ("llama-gqa", "sdpa"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
        ("deepseek_v3", "eager"),
        ("deepseek_v3", "sdpa"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
    ],
)
def test_dropout_runs_stock_code_with_its_random_numbers(family: str, implementation: str) -> None:
    names = {"gpt2": "attn_pdrop"}
    changes = {names.get(family, "attention_dropout"): 0.3}
    results = []
    for attach in (False, True):
        model = make(family, attn_implementation=implementation, **changes).train()
        if attach:
            headwise.attach(model)
        results.append(_step(model, use_cache=False, attention_mask=PADDING)[0])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    without = _step(make(family).train(), use_cache=False, attention_mask=PADDING)[0]
    assert not torch.isclose(results[1], without, atol=1e-4)
