"""Makes tests/nn/memory_numbers.json, what the package memorizing-transformers-pytorch gives.

    pip install --no-deps memorizing-transformers-pytorch==0.4.1
    pip install faiss-cpu einops einops-exts filelock joblib
    python benchmarks/memory_judge.py

Its layer `KNNAttention` over three segments, each of which finds the rows of those before it. It
searches a graph of float32 rows: that it found the nearest is checked here.
"""

import json
import tempfile
from pathlib import Path

import torch
from memorizing_transformers_pytorch.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memorizing_transformers_pytorch import KNNAttention

HEADS, DIM, TOP, EMBEDDING, LENGTH, SCALE = 3, 4, 5, 7, 6, 9.0


class Checked(KNNMemory):
    """What is found is what a sort of all finds; given and taken in float64."""

    past = torch.zeros(2, 0, DIM, dtype=torch.float64)

    def search(self, queries, topk, **options):
        found, mask = super().search(queries.float(), topk, **options)
        found = found.double()
        if self.past.shape[1]:
            nearest = (queries @ self.past[:, None].transpose(-1, -2)).topk(topk, dim=-1).values
            given = (queries.unsqueeze(-2) * found[..., 0, :]).sum(-1).sort(-1, True).values
            torch.testing.assert_close(given, nearest, atol=1e-6, rtol=0)
        return found, mask

    def add(self, memories):
        self.past = torch.cat([self.past, memories[..., 0, :]], dim=1)
        super().add(memories.float())


def main() -> None:
    torch.manual_seed(0)
    layer = KNNAttention(
        dim=EMBEDDING,
        heads=HEADS,
        dim_head=DIM,
        num_retrieved_memories=TOP,
        attn_scale_init=SCALE,
    )
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            parameter.data.copy_((64 * parameter).round() / 64)  # few digits, which a file can hold
    layer = layer.double().eval()
    x = (8 * torch.randn(3, 2, LENGTH, EMBEDDING, dtype=torch.float64)).round() / 8
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        memory = Checked(
            dim=DIM, max_memories=512, num_indices=2, memmap_filename=f"{folder}/rows.memmap"
        )
        outs = [layer(segment, knn_memory=memory)[0] for segment in x]
    numbers = {
        "heads": HEADS,
        "dim": DIM,
        "top": TOP,
        "scale": layer.scale.exp().flatten()[0].item(),
        "to_q": layer.to_q.weight.tolist(),
        "to_kv": layer.to_kv.weight.tolist(),
        "to_out": layer.to_out.weight.tolist(),
        "x": x.tolist(),
        "out": torch.stack(outs).tolist(),
    }
    file = Path(__file__).parents[1] / "tests" / "nn" / "memory_numbers.json"
    file.write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
