"""torch.compile of an attached model: whole graphs, and no recompilation while decoding."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import headwise
from families import DECODERS, HYBRID, KIN, VOCABULARY, make
from older_stock import needs

PROMPT = torch.randint(3, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(1))
STEPS = 24


def _decode(model: Any, step: Any = None) -> torch.Tensor:
    """Greedy tokens [1, STEPS] with a static cache: prefill by `model`, each token by `step`."""
    step = model if step is None else step
    cache = StaticCache(config=model.config, max_cache_len=PROMPT.shape[1] + STEPS + 1)
    with torch.no_grad():
        token = model(PROMPT, cache=cache).logits[:, -1:].argmax(-1)
        tokens = [token]
        for _ in range(STEPS - 1):
            token = step(token, cache=cache).logits[:, -1:].argmax(-1)
            tokens.append(token)
    return torch.cat(tokens, dim=1)


def _compiled(model: Any, backend: str) -> tuple[torch.Tensor, int]:
    """Tokens decoded by compiled steps, and how many graphs were compiled for them."""
    torch._dynamo.reset()
    counters.clear()
    tokens = _decode(model, torch.compile(model, fullgraph=True, backend=backend))
    return tokens, counters["stats"]["unique_graphs"]


def _has_windows(model: Any) -> bool:
    layers = headwise.ModelSpec.from_config(model.config).layers
    return any(at.attention is not None and at.attention.window for at in layers)


# One of each kind: groups, cap and window, sinks, latents, its own forward. `make sweep` has all.
COMPILED = ("llama-gqa", "gemma2", "gpt_oss", "deepseek_v3", "bloom")


# Falcon with ALiBi takes no static cache in stock either, and LongCat's experts are no whole graph.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=(
                *([] if name in COMPILED else [pytest.mark.sweep]),
                *([needs("5.22", "Bloom's ALiBi has no static cache")] if name == "bloom" else []),
            ),
        )
        for name in DECODERS
        if name not in ("falcon-rw", "longcat_flash")
    ],
)
# Bloom's own GELU
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_decoding_is_one_graph_compiled_once(family: str) -> None:
    layers = {"layer_types": HYBRID[:2]} if family in ("gemma2", "gemma3", "gpt_oss") else {}
    # the one needs the layers that share, the other has lists with a size for each layer
    fewer = {} if family in ("gemma3n", "headwise_mla", *KIN) else {"num_hidden_layers": 2}
    model = make(family, **fewer, **layers)
    # a static cache's sliding layers count tokens in Python: stock itself compiles those anew
    expected, graphs = _compiled(model, "eager") if _has_windows(model) else (_decode(model), 1)
    headwise.attach(model)
    tokens, ours = _compiled(model, "eager")
    assert torch.equal(tokens, expected)
    assert ours <= graphs


# torch 2.13 scripts a helper of its own when it first compiles for a CPU
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_decoding_compiled_to_machine_code_gives_the_tokens_of_stock() -> None:
    model = make("llama-gqa", num_hidden_layers=1)
    expected = _decode(model)
    headwise.attach(model)
    tokens, graphs = _compiled(model, "inductor")
    assert torch.equal(tokens, expected)
    assert graphs == 1
