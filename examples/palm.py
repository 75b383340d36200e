"""PaLM out of `headwise.nn`: multi-query attention and a SwiGLU side by side in each block.

Chowdhery et al. 2022, arXiv 2204.02311, section 2: one kv head, attention and feed-forward in
parallel behind one norm, SwiGLU, rotary embedding, no biases anywhere (norms neither), input and
output embedding shared. Transformers has no PaLM.

    python examples/palm.py [FILE]

trains a small one on the bytes of a file (this one, if none is given) and lets it continue.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise import AttentionSpec
from headwise.caches import ContiguousCache
from headwise.nn import Attention, Rope


class Block(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x))."""

    def __init__(self, spec: AttentionSpec, size: int, inner: int, rope: Rope) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, bias=False)
        self.attention = Attention(spec, size, rope=rope)
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, hidden: Tensor, cache: ContiguousCache | None = None) -> Tensor:
        """[B, S, E] to [B, S, E]."""
        read = self.norm(hidden)
        fed = self.down(F.silu(self.gate(read)) * self.up(read))
        return hidden + self.attention(read, cache=cache) + fed


class PaLM(nn.Module):
    """The paper's 8B has 32 blocks, 16 heads of 256 and a hidden size of 4096."""

    def __init__(
        self, *, vocabulary: int, blocks: int, heads: int, head_dim: int, hidden_size: int
    ) -> None:
        super().__init__()
        spec = AttentionSpec(heads=heads, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
        rope = Rope(head_dim)
        self.embedding = nn.Embedding(vocabulary, hidden_size)
        nn.init.normal_(self.embedding.weight, std=hidden_size**-0.5)
        self.blocks = nn.ModuleList(
            Block(spec, hidden_size, 4 * hidden_size, rope) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)

    def forward(self, tokens: Tensor, caches: Sequence[ContiguousCache] | None = None) -> Tensor:
        """tokens [B, S] to logits [B, S, vocabulary]."""
        hidden = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, None if caches is None else caches[index])
        return F.linear(self.norm(hidden), self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy; each block's cache holds one key and one value head."""
        caches = [ContiguousCache() for _ in self.blocks]
        read = tokens
        for _ in range(max_new_tokens):
            read = self(read, caches)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, read), dim=1)
        return tokens


def main(path: str = __file__, steps: int = 150) -> None:
    """Train on the bytes of a file and continue its beginning."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(path).read_bytes()))
    model = PaLM(vocabulary=256, blocks=2, heads=4, head_dim=32, hidden_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    length = min(128, len(text) - 1)
    for step in range(steps):
        starts = torch.randint(len(text) - length, (16,))
        batch = torch.stack([text[at : at + length + 1] for at in starts])
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.2f} nats a byte")
    written = model.generate(text[None, :32], max_new_tokens=160)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main(*sys.argv[1:2])
