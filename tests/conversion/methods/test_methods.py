"""The maths on layers that can be converted without loss, where only the right answer is exact."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwise.conversion.methods import decomposition, merging, statistics
from headwise.conversion.methods.planes import from_planes, to_planes
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.refit import Refit
from headwise.conversion.methods.statistics import LayerStatistics, Moments, Sensitivity

HIDDEN, HEADS, KV_HEADS, DIM, LENGTH = 40, 8, 4, 6, 11
FREQUENCIES = torch.tensor([1.0, 0.3, 0.02])


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


_GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seed() -> None:
    _GENERATOR.manual_seed(7)


def _layer(key: Tensor, value: Tensor) -> Projections:
    return Projections(
        query=_draw(HEADS * DIM, HIDDEN + 1),
        key=key,
        value=value,
        output=_draw(HIDDEN, HEADS * DIM),
        heads=HEADS,
        kv_heads=KV_HEADS,
        biased=True,
    )


def _related(groups: list[list[int]], *, kv_heads: int = KV_HEADS) -> Projections:
    """Keys of a group are complex multiples of one key, plane by plane; values maps of one."""
    key = torch.zeros(kv_heads, DIM // 2, HIDDEN + 1, dtype=torch.complex64)
    value = torch.zeros(kv_heads, DIM, HIDDEN + 1)
    for group in groups:
        shared, base = to_planes(_draw(DIM, HIDDEN + 1), 1), _draw(DIM, HIDDEN + 1)
        for head in group:
            turn = torch.complex(_draw(DIM // 2, 1), _draw(DIM // 2, 1))
            key[head] = turn * shared[0]
            value[head] = _draw(DIM, DIM) @ base
    return _layer(from_planes(key), value.flatten(0, 1))


def _rotated(x: Tensor) -> Tensor:
    """RoPE on [heads, L, D], by its definition."""
    angle = torch.arange(x.shape[1])[:, None] * FREQUENCIES
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat(
        [
            real * angle.cos() - imaginary * angle.sin(),
            imaginary * angle.cos() + real * angle.sin(),
        ],
        dim=-1,
    )


def _attention(layer: Projections, inputs: Tensor) -> Tensor:
    """A layer's output for inputs [L, E+1]: every step written out."""
    query, key, value = (
        (inputs @ weight.T).view(len(inputs), heads, -1).transpose(0, 1)
        for weight, heads in (
            (layer.query, layer.heads),
            (layer.key, layer.kv_heads),
            (layer.value, layer.kv_heads),
        )
    )
    out = []
    for head in range(layer.heads):
        served = head // (layer.heads // layer.kv_heads)
        scores = _rotated(query[head][None])[0] @ _rotated(key[served][None])[0].T * DIM**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ value[served])
    return torch.cat(out, dim=-1) @ layer.output.T


def _latent_attention(
    layer: Projections, made: decomposition.LatentWeights, inputs: Tensor
) -> Tensor:
    """The same for MLA, from the latent and the rotary key alone."""
    cached, rank = inputs @ made.down.T, made.up.shape[2]
    angle = torch.arange(len(inputs))[:, None] * FREQUENCIES[made.planes]
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = cached[:, rank:]
    rotated = torch.complex(*(half.contiguous() for half in pairs.chunk(2, dim=-1))) * turn
    query = (inputs @ layer.query.T).view(len(inputs), HEADS, DIM)
    out = []
    for head in range(HEADS):
        planes = torch.complex(*(half.contiguous() for half in query[:, head].chunk(2, dim=-1)))
        met = planes[:, made.planes] * made.mix[head] * turn
        up_key, up_value = made.up[head].split([made.up.shape[1] - DIM, DIM])
        scores = (met.conj() @ rotated.T).real
        if len(up_key):
            scores = scores + query[:, head] @ up_key @ cached[:, :rank].T
        scores = scores * DIM**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ (cached[:, :rank] @ up_value.T))
    return torch.cat(out, dim=-1) @ layer.output.T


def _inputs(count: int = LENGTH) -> Tensor:
    return torch.cat([_draw(count, HIDDEN), torch.ones(count, 1)], dim=1)


def _moments() -> Moments:
    moments = Moments(HIDDEN)
    moments.add(_inputs(400)[:, :-1])
    return moments


def _decomposition(
    layer: Projections, rotary_scale: float = 1.0, moments: Moments | None = None
) -> decomposition.Decomposition:
    moments = moments or _moments()
    sensitivity = Sensitivity(torch.linspace(0.5, 1.5, HEADS), torch.linspace(1.5, 0.5, HEADS))
    distances = torch.full((LENGTH,), 1 / LENGTH)
    return decomposition.aware(
        layer, LayerStatistics(moments, sensitivity, FREQUENCIES, distances, rotary_scale)
    )


def test_related_heads_merge_without_loss_and_pooling_them_does_not() -> None:
    layer, inputs = _related([[0, 1, 2, 3]]), _inputs()
    merged = merging.aligned(layer, _moments(), 1)
    assert merged.kv_heads == 1
    assert merged.key.shape == (DIM, HIDDEN + 1)
    wanted = _attention(layer, inputs)
    torch.testing.assert_close(_attention(merged, inputs), wanted, rtol=1e-3, atol=1e-2)
    apart = (_attention(merging.pooled(layer, 1), inputs) - wanted).norm() / wanted.norm()
    assert apart > 0.5


def test_heads_that_belong_together_are_found() -> None:
    layer, inputs = _related([[0, 2], [1, 3]]), _inputs()
    moments = _moments()
    assert sorted(merging.grouped(layer, moments.second, 2)) == [[0, 2], [1, 3]]
    merged, wanted = merging.aligned(layer, moments, 2), _attention(layer, inputs)
    # query heads moved with their kv heads, and the output projection's columns with them
    torch.testing.assert_close(_attention(merged, inputs), wanted, rtol=1e-3, atol=1e-2)


def test_pooling_is_the_mean() -> None:
    layer = _related([[0], [1], [2], [3]])
    pooled = merging.pooled(layer, 2)
    torch.testing.assert_close(pooled.key[:DIM], (layer.key[:DIM] + layer.key[DIM : 2 * DIM]) / 2)
    assert pooled.query is layer.query


def test_exact_latents_give_the_original_output() -> None:
    layer, inputs = _related([[0], [1], [2], [3]]), _inputs()
    made = decomposition.exact(layer)
    assert made.up.shape == (HEADS, DIM, KV_HEADS * DIM)
    assert 2 * len(made.planes) == KV_HEADS * DIM
    out = _latent_attention(layer, made, inputs)
    torch.testing.assert_close(out, _attention(layer, inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mechanism", ["mqa", "mla"])
def test_what_the_text_never_shows_is_not_all_cut_away(
    mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text shows eight directions of the inputs, in which heads differ; others have them all,
    and in the rest of them heads have the same values but for a map.
    """
    layer, others = _related([[0, 1, 2, 3]]), _inputs()
    few = torch.linalg.qr(_draw(HIDDEN, 8))[0]
    apart = _draw(KV_HEADS * DIM, 8) @ few.T
    layer = replace(layer, value=layer.value + torch.nn.functional.pad(apart, (0, 1)))
    moments = Moments(HIDDEN)
    moments.add(_draw(400, 8) @ few.T)

    def values(inputs: Tensor) -> Tensor:
        """What the output projection makes of all values, whatever the scores are."""
        if mechanism == "mqa":
            merged = merging.aligned(layer, moments, 1)
            back = merged.output.view(HIDDEN, HEADS, DIM)
            return torch.einsum("lv,ehv->lhe", inputs @ merged.value.T, back)
        made = _decomposition(layer, moments=moments).weights(DIM, 8)
        heads = inputs @ made.down[:DIM].T @ made.up[:, -DIM:].mT
        output = layer.output.view(HIDDEN, HEADS, DIM)
        return torch.einsum("hlv,ehv->lhe", heads, output)

    value = (others @ layer.value.T).view(LENGTH, KV_HEADS, 1, DIM)
    value = value.expand(-1, -1, HEADS // KV_HEADS, -1).flatten(1, 2)
    wanted = torch.einsum("lhv,ehv->lhe", value, layer.output.view(HIDDEN, HEADS, DIM))
    aware = values(others)
    monkeypatch.setattr(statistics, "shrunk", lambda covariance: covariance)
    trusting = values(others)
    assert (aware - wanted).norm() < 0.8 * (trusting - wanted).norm()


def test_a_latent_as_large_as_what_it_holds_loses_nothing() -> None:
    # one key for all heads, and values of one rank: a rope of D and a latent of V are enough
    layer, inputs = _related([[0, 1, 2, 3]]), _inputs()
    cut = _decomposition(layer)
    wanted = _attention(layer, inputs)
    out = _latent_attention(layer, cut.weights(DIM, DIM), inputs)
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=2e-2)
    less = _latent_attention(layer, cut.weights(DIM - 2, DIM), inputs)
    assert (less - wanted).norm() / wanted.norm() > 0.05


def test_slow_planes_go_without_position_first() -> None:
    cut = _decomposition(_related([[0], [1], [2], [3]]))
    planes = cut.weights(8, 6).planes
    assert 2 not in planes  # 0.02 radians a token: over 11 tokens hardly a turn


def test_a_key_without_position_is_scaled_by_the_mean_turn() -> None:
    layer = _related([[0], [1], [2], [3]])
    cut = _decomposition(layer)
    distance = torch.arange(LENGTH)
    turn = torch.exp(-1j * distance[:, None] * FREQUENCIES).mean(0)
    torch.testing.assert_close(cut.statistics.mean_turn, turn.to(torch.complex64))


def test_keys_without_position_count_as_yarn_makes_the_rotated_ones_count() -> None:
    layer = _related([[0], [1], [2], [3]])
    plain = _decomposition(layer)
    _GENERATOR.manual_seed(7)
    _related([[0], [1], [2], [3]])
    scaled = _decomposition(layer, rotary_scale=1.5)  # on queries and on keys
    ups = [cut.weights(20, 8).up for cut in (plain, scaled)]
    torch.testing.assert_close(ups[1][:, :DIM], 2.25 * ups[0][:, :DIM], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ups[1][:, DIM:], ups[0][:, DIM:], rtol=1e-3, atol=1e-4)


def test_the_naive_cut_of_everything_is_exact_too() -> None:
    layer, inputs = _related([[0], [1], [2], [3]]), _inputs()
    made = decomposition.plain(layer).weights(KV_HEADS * DIM, KV_HEADS * DIM)
    out = _latent_attention(layer, made, inputs)
    torch.testing.assert_close(out, _attention(layer, inputs), rtol=1e-3, atol=1e-2)


def test_refit_finds_the_projection_that_made_the_outputs() -> None:
    heads, true = _draw(500, 12), _draw(HIDDEN, 12)
    sums = Refit(12, HIDDEN)
    for part in heads.split(100):
        sums.add(part, part @ true.T)
    torch.testing.assert_close(sums.solve(torch.zeros_like(true)), true, rtol=1e-2, atol=1e-2)


def test_refit_stays_at_the_start_where_the_text_says_nothing() -> None:
    sums, start = Refit(12, HIDDEN), _draw(HIDDEN, 12)
    for _ in range(4):  # noise: neither half predicts the other
        heads = _draw(15, 12)
        sums.add(heads, heads @ start.T + 20 * _draw(15, HIDDEN))
    assert sums.chosen(start) == 10.0
    away = (sums.solve(start) - start).norm()
    free = Refit.solved(start, 1e-3, sums.gram.sum(0), sums.cross.sum(0))
    assert away < 0.2 * (free - start).norm()


def test_moments_count_every_row_once() -> None:
    inputs = _inputs(60)
    moments = Moments(HIDDEN)
    for part in inputs[:, :-1].view(3, 20, HIDDEN):
        moments.add(part)
    torch.testing.assert_close(moments.second, inputs.T @ inputs / 60, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moments.centred[:-1, :-1], inputs[:, :-1].T.cov(correction=0), rtol=1e-3, atol=1e-4
    )


def test_scores_matter_by_what_their_tokens_would_change() -> None:
    """Against finite differences: a small error of every score, of random sign."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, LENGTH, DIM) for heads in (2, 1, 1))
    output = torch.randn(HIDDEN, 2 * DIM)
    sensitivity = Sensitivity.measure(query, key, value, output, DIM**-0.5)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()

    def attend(head: int, error: Tensor) -> Tensor:
        scores = (query[0, head] @ key[0, 0].T + error) * DIM**-0.5
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return weights @ value[0, 0] @ output[:, head * DIM : (head + 1) * DIM].T

    for head in range(2):
        changes = []
        for _ in range(400):
            error = 1e-2 * torch.randn(LENGTH, LENGTH)
            changed = attend(head, error) - attend(head, torch.zeros(LENGTH, LENGTH))
            changes.append(changed.square().sum(-1).mean() / 1e-4)
        expected = torch.stack(changes).mean()
        torch.testing.assert_close(sensitivity.score[head], expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("silent", ["query", "key", "value", "output"])
def test_a_projection_of_zeros_converts_to_numbers(silent: str) -> None:
    layer = _related([[0], [1], [2], [3]])
    layer = replace(layer, **{silent: torch.zeros_like(getattr(layer, silent))})
    moments = _moments()
    merged = merging.aligned(layer, moments, 2)
    assert all(getattr(merged, name).isfinite().all() for name in ("query", "key", "output"))
    made = _decomposition(layer).weights(12, 8)
    assert made.down.isfinite().all()
    assert made.up.isfinite().all()
    assert torch.view_as_real(made.mix).isfinite().all()
    out = _latent_attention(layer, made, _inputs())
    if silent in ("value", "output"):
        torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-4, rtol=0)


def test_heads_that_put_out_nothing_leave_the_projection_as_it_is() -> None:
    sums, start = Refit(12, HIDDEN), _draw(HIDDEN, 12)
    for _ in range(2):
        sums.add(torch.zeros(20, 12), _draw(20, HIDDEN))
    assert torch.equal(sums.solve(start), start)
