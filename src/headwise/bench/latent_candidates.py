"""What computes absorbed latent attention (MLA), beside headwise."""

import torch
from torch import Tensor

import headwise.ops as ops
from headwise.bench.candidate import Absent, Bind, Candidate, how, never_missing, on_each
from headwise.measure.inputs import LatentInputs
from headwise.measure.shape import Shape


def _headwise(shape: Shape, inputs: LatentInputs) -> Bind:
    return on_each(lambda given: given.attend())


def chosen_latent_backend(shape: Shape, inputs: LatentInputs) -> str:
    """Which of headwise's backends runs these inputs, and how."""
    absorbed = shape.spec.absorbed()
    problem = ops.Problem(
        batch=shape.batch,
        heads=absorbed.heads,
        kv_heads=1,
        query_length=shape.query_length,
        context=max(shape.lengths),
        head_dim=absorbed.head_dim,
        value_dim=absorbed.value_dim,
        dtype=inputs.latent.dtype,
        device=inputs.latent.device.type,
        causal=True,
        ragged=inputs.kv_lengths is not None,
        split_key=shape.spec.nope_dim > 0,
    )
    return how(ops.explain_problem(problem))


def _torch(shape: Shape, inputs: LatentInputs) -> Bind | Absent:
    if chosen_latent_backend(shape, inputs).startswith("torch:"):
        return Absent("headwise runs on its torch backend here itself")
    return on_each(lambda given: given.attend("torch"))


def _matmul(shape: Shape, inputs: LatentInputs) -> Bind:
    spec, batch, queries = shape.spec, shape.batch, shape.query_length
    rank = spec.absorbed().value_dim
    hidden = inputs.hidden()

    def run(given: LatentInputs) -> Tensor:
        query = torch.cat([given.query_nope @ given.w_uk, given.query_rope], dim=-1)
        rows = query.mul_(spec.scale).view(batch, 1, spec.heads * queries, -1)
        scores = rows @ given.joined.transpose(-1, -2)
        scores = scores.view(batch, spec.heads, queries, -1)
        if hidden is not None:
            scores = scores.masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1).view(batch, 1, spec.heads * queries, -1)
        out = weights @ given.joined[..., :rank]
        return out.view(batch, spec.heads, queries, rank) @ given.w_uv.transpose(-1, -2)

    return on_each(run)


LATENT_HEADWISE = Candidate(
    "headwise", "headwise.latent_attention, absorbed, its default backend", never_missing, _headwise
)

LATENT_PEERS = (
    Candidate("torch", "headwise's torch backend (mla only)", never_missing, _torch),
    Candidate("matmul", "matmul, softmax, matmul; mla: on the joined key", never_missing, _matmul),
)
