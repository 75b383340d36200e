"""The example is PaLM: its block equals that of PaLM-rlhf-pytorch with the same weights."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_PATH = Path(__file__).parents[2] / "examples" / "palm.py"


@pytest.fixture(scope="module")
def palm() -> Any:
    spec = importlib.util.spec_from_file_location("palm_example", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["palm_example"] = module
    spec.loader.exec_module(module)
    return module


def test_a_block_is_that_of_palm_rlhf_pytorch(palm: Any) -> None:
    from palm_rlhf_pytorch.palm import ParallelTransformerBlock

    theirs = ParallelTransformerBlock(48, dim_head=16, heads=6, use_xpos=False)
    ours = palm.PaLM(vocabulary=9, blocks=1, heads=6, head_dim=16, hidden_size=48).blocks[0]
    with torch.no_grad():
        theirs.norm.gamma.normal_()
        ours.norm.weight.copy_(theirs.norm.gamma + 1)
        # SwiGLU's first half is multiplied, its second one gates
        parts = theirs.fused_attn_ff_proj.weight.split([96, 16, 16, 192, 192])
        own = ours.attention
        layers = (own.q_proj, own.k_proj, own.v_proj, ours.up, ours.gate)
        for layer, weight in zip(layers, parts, strict=True):
            layer.weight.copy_(weight)
        own.o_proj.weight.copy_(theirs.attn_out.weight)
        ours.down.weight.copy_(theirs.ff_out[2].weight)
    x = torch.randn(2, 31, 48)
    gradients = []
    for block in (lambda x: x + theirs(x), ours):
        given = x.clone().requires_grad_()
        out = block(given)
        out.square().sum().backward()
        gradients.append((out.detach(), given.grad))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_uncached(palm: Any) -> None:
    torch.manual_seed(0)
    model = palm.PaLM(vocabulary=50, blocks=2, heads=4, head_dim=8, hidden_size=32)
    tokens = torch.randint(50, (2, 5))
    given = model.generate(tokens, max_new_tokens=12)
    for _ in range(12):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(given, tokens)
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_the_example_runs(palm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    palm.main(steps=2)
    output = capsys.readouterr().out
    assert "nats a byte" in output
    assert '"""PaLM out of `headwise.nn`: mu' in output
