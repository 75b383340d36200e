"""A capture keeps the weights of stock's eager attention, and changes nothing in the run."""

from typing import Any

import pytest
import torch

import families
import headwise
from generation.models import LIMIT, make
from headwise.hf.observer import observing
from headwise.measure.memory import peak_memory
from headwise.viewing import LayerView
from headwise.viewing.capture import Capture, Wanted
from headwise.viewing.forward_pass import attached, run
from headwise.viewing.layer import STATISTICS

N = 23
# What the promise is: float32 weights of a whole model's layers.
TOLERANCE = 1e-5
EAGER = tuple(name for name in families.FAMILIES if name not in (*families.OWN_FORWARD, "t5"))


def ids(count: int = N) -> torch.Tensor:
    return torch.randint(2, families.VOCABULARY, (1, count))


def captured(model: Any, given: torch.Tensor, **wanted: Any) -> list[LayerView]:
    count = given.shape[1]
    capture = Capture(model, Wanted(tokens=count, **{"rows": tuple(range(count)), **wanted}))
    headwise.attach(model)
    with torch.no_grad(), observing(capture):
        model(given, use_cache=False)
    headwise.detach(model)
    return capture.views(count)


def stock(family: str, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model = families.make(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(given, output_attentions=True).attentions


def own(family: str, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model = families.make(family)
    headwise.attach(model)
    with torch.no_grad():
        return model(given, output_attentions=True, use_cache=False).attentions


@pytest.mark.parametrize("family", EAGER)
def test_rows_are_the_weights_of_stocks_eager_attention(family: str) -> None:
    given = ids()
    for layer, expected in zip(captured(families.make(family), given), stock(family, given)):
        assert (layer.weights - expected[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "count", "new"),
    [
        ("llama-dynamic", 71, 0),
        ("phi3-longrope", 71, 0),
        # the text is read anew, all of it by the long factors, at the token past the limit
        ("phi3-longrope", LIMIT - 3, 6),
    ],
)
def test_rows_of_a_run_are_those_of_stocks_eager_attention_where_rotations_depend_on_the_length(
    monkeypatch, name: str, count: int, new: int
) -> None:
    monkeypatch.setattr("headwise.generation.chunks.CHUNK", 16)
    total, given = count + new, ids(count)[0].tolist()
    model = make(name)
    capture = Capture(model, Wanted(tokens=total, rows=tuple(range(total))))
    with attached(model) as cache:
        decoded, _ = run(model, given, new, capture, cache)
    expected = make(name)
    expected.set_attn_implementation("eager")
    with torch.no_grad():
        found = expected(torch.tensor([[*given, *decoded]]), output_attentions=True).attentions
    for layer, weights in zip(capture.views(total), found, strict=True):
        assert (layer.weights - weights[0]).abs().max() < TOLERANCE
        assert layer.tiles_mean is not None
        side = weights.shape[-1] // layer.tile * layer.tile
        pooled = torch.nn.functional.avg_pool2d(weights[0, :, :side, :side], layer.tile)
        rows = pooled.shape[-1]
        below = torch.ones(rows, rows).tril(-1).bool()  # on the diagonal the mean is of fewer
        apart = (layer.tiles_mean[:, :rows, :rows] - pooled)[:, below]
        assert apart.numel()
        assert apart.abs().max() < TOLERANCE


@pytest.mark.parametrize("family", families.OWN_FORWARD)
def test_rows_are_the_weights_of_families_with_a_forward_of_their_own(family: str) -> None:
    given = ids()
    for layer, expected in zip(captured(families.make(family), given), own(family, given)):
        assert (layer.weights - expected[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["bert", "llama-gqa", "mistral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("count", [67, 131])
def test_tiles_are_the_largest_and_the_mean_weight_of_their_squares(
    family: str, count: int
) -> None:
    given = ids(count)
    views = captured(families.make(family), given, rows=(count - 1,))
    for layer, expected in zip(views, stock(family, given)):
        tile, side = layer.tile, -(-count // layer.tile)
        assert tile > 1
        assert layer.tiles_max is not None and layer.tiles_max.shape[1] == side
        for row in (0, 1, side - 1):
            for column in (0, side // 2, side - 1):
                square = expected[0, :, row * tile :, column * tile :][:, :tile, :tile]
                assert torch.allclose(
                    layer.tiles_max[:, row, column], square.amax(dim=(1, 2)), atol=TOLERANCE
                )
                assert torch.allclose(
                    layer.tiles_mean[:, row, column], square.mean(dim=(1, 2)), atol=TOLERANCE
                )


@pytest.mark.parametrize("family", ["bert", "llama-gqa", "mistral", "gpt_oss"])
def test_figures_of_heads_are_those_of_the_whole_matrix(family: str) -> None:
    given = ids()
    views = captured(families.make(family), given)
    for layer, expected in zip(views, stock(family, given)):
        weights = expected[0].double()
        at = torch.arange(N)
        means = {
            "entropy": torch.special.entr(weights).sum(-1).mean(-1) / torch.tensor(2.0).log(),
            "distance": (weights * (at[:, None] - at).abs()).sum(-1).mean(-1),
            "first": weights[..., 0].mean(-1),
            "previous": weights.diagonal(-1, dim1=1, dim2=2).mean(-1),
            "itself": weights.diagonal(dim1=1, dim2=2).mean(-1),
        }
        for index, name in enumerate(STATISTICS):
            assert torch.allclose(
                layer.statistics[:, index].double(), means[name], atol=1e-4, rtol=1e-4
            ), name


def test_figures_without_an_overview_are_those_of_the_chosen_rows() -> None:
    given = ids()
    every = captured(families.make("llama-gqa"), given)
    chosen = captured(families.make("llama-gqa"), given, rows=(5, 11), overview=False)
    for layer, whole in zip(chosen, every):
        itself = whole.weights[:, [5, 11], [5, 11]].mean(dim=1)
        assert torch.allclose(layer.statistics[:, STATISTICS.index("itself")], itself, atol=1e-6)
        assert layer.tiles_max is None


@pytest.mark.parametrize(
    ("family", "mechanism", "shared"),
    [
        ("bert", "MHA", [0, 1, 2, 3, 4, 5]),
        ("llama-gqa", "GQA", [0, 0, 0, 1, 1, 1]),
        ("gpt_bigcode", "MQA", [0] * 6),
        ("falcon-40b", "GQA", [0, 0, 0, 1, 1, 1]),
        ("deepseek_v3", "MLA", [0] * 6),
    ],
)
def test_heads_know_the_kv_head_that_they_share(
    family: str, mechanism: str, shared: list[int]
) -> None:
    for layer in captured(families.make(family), ids()):
        assert (layer.mechanism, layer.kv_head_of) == (mechanism, shared)


@pytest.mark.parametrize("family", families.MLA)
@pytest.mark.parametrize("count", [1, N])
def test_latent_scores_have_a_content_and_a_rope_part(family: str, count: int) -> None:
    """Absorbed (one query) and expanded, both are what the module's own query and key give."""
    model = families.make(family)
    given = ids()
    parts: dict[int, torch.Tensor] = {}

    def expanded(seen: Any) -> torch.Tensor:
        query, key = seen.query[0], seen.key[0]
        if seen.query.shape[2] == N:
            nope = seen.content_dim
            parts[seen.module.layer_idx] = query[:, -1:, :nope] @ key[..., :nope].mT
        return seen.out

    headwise.attach(model)
    with torch.no_grad(), observing(expanded):
        model(given, use_cache=False)
    capture = Capture(model, Wanted(tokens=N, rows=(N - 1,)))
    with torch.no_grad(), observing(capture):
        cache = model(given[:, : N - count], use_cache=True).cache if count < N else None
        model(given[:, N - count :], cache=cache, use_cache=True)
    specs = [at.attention for at in headwise.ModelSpec.from_config(model.config).layers]
    for layer, spec in zip(capture.views(N), filter(None, specs), strict=True):
        assert layer.latent == (spec.latent_rank, spec.rope_dim)
        assert layer.content is not None
        assert torch.allclose(layer.content, parts[layer.index], atol=1e-4, rtol=1e-4)
        assert torch.allclose(layer.weights.sum(-1), torch.ones(6, 1), atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "gpt_oss", "deepseek_v3", "falcon-40b"])
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_decoded_tokens_have_the_rows_of_one_forward_pass(family: str, cache: str) -> None:
    given = ids()
    whole = captured(families.make(family), given)
    model = families.make(family)
    headwise.attach(model, cache=cache)
    capture = Capture(model, Wanted(tokens=N, rows=tuple(range(N))))
    held = None
    with torch.no_grad(), observing(capture):
        for start, stop in ((0, 11), (11, 17), *((at, at + 1) for at in range(17, N))):
            held = model(given[:, start:stop], cache=held, use_cache=True).cache
    for layer, expected in zip(capture.views(N), whole):
        assert (layer.weights - expected.weights).abs().max() < TOLERANCE
        assert torch.allclose(layer.tiles_max, expected.tiles_max, atol=TOLERANCE)
        assert torch.allclose(layer.statistics, expected.statistics, atol=1e-3)


def test_only_chosen_layers_heads_and_rows_are_kept() -> None:
    given = ids()
    every = captured(families.make("llama-gqa"), given)
    (layer,) = captured(families.make("llama-gqa"), given, layers=(2,), heads=(1, 4), rows=(3, 20))
    assert layer.heads == [1, 4]
    assert layer.kv_head_of == [0, 1]
    assert (layer.weights - every[2].weights[[1, 4]][:, [3, 20]]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama-gqa", "bert", "deepseek_v3", "gemma2", "bloom"])
def test_looking_on_changes_nothing(family: str) -> None:
    model, given = families.make(family), ids()
    headwise.attach(model)
    with torch.no_grad():
        before = model(given)[0]
        with observing(Capture(model, Wanted(tokens=N, rows=(1, 5)))):
            seen = model(given)[0]
    assert torch.equal(before, seen)


def test_another_models_calls_are_not_kept() -> None:
    model, other = families.make("llama-gqa"), families.make("llama-mha")
    capture = Capture(model, Wanted(tokens=N, rows=(0,)))
    headwise.attach(other)
    with torch.no_grad(), observing(capture):
        other(ids())
    assert not capture.layers


def test_a_silenced_head_is_one_whose_output_projection_is_zero() -> None:
    given = ids()
    model = families.make("llama-gqa")
    headwise.attach(model)
    with torch.no_grad(), observing(Capture(model, Wanted(tokens=0), {1: [4]})):
        silenced = model(given).logits
    dim = model.config.hidden_size // 6
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 4 * dim : 5 * dim] = 0.0
        expected = model(given).logits
    assert torch.allclose(silenced, expected, atol=1e-4)


def test_memory_follows_the_rows_and_not_the_square_of_the_context() -> None:
    """4,096 tokens: all weights would be 3 layers x 6 heads x 64 MiB, and one layer's 384 MiB."""
    count = 4096
    model = families.make("llama-gqa", max_position_embeddings=count)
    given = ids(count)
    headwise.attach(model)

    def look() -> Any:
        capture = Capture(model, Wanted(tokens=count, rows=(7, count - 1)))
        with torch.no_grad(), observing(capture):
            model(given, use_cache=False, logits_to_keep=1)
        return capture

    capture, peak = peak_memory(look)
    assert len(capture.views(count)) == 3
    assert peak is None or peak < 160 * 2**20
