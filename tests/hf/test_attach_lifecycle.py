"""Attach and detach as operations on a model object: what they leave, save, copy and refuse."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import headwise
from families import FAMILIES, GENERATORS, OWN_FORWARD, VOCABULARY, make
from headwise.hf.module_hook import NAME

PROMPT = torch.randint(3, VOCABULARY, (1, 13), generator=torch.Generator().manual_seed(8))


def _tokens(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False)


def _state(model: Any) -> dict[str, Any]:
    """Everything on the model object and its modules that attaching could have touched."""
    state: dict[str, Any] = {"class": type(model), "model": set(model.__dict__)}
    for name, module in model.named_modules():
        state[name] = (type(module), set(module.__dict__), list(module._forward_pre_hooks))
        if isinstance(module, hf.PreTrainedModel):
            state[f"{name} attention"] = module.config._attn_implementation
            state[f"{name} config"] = set(module.config.__dict__)
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_leaves_nothing_behind(family: str) -> None:
    model = make(family)
    before = _state(model)
    headwise.attach(model)
    assert _state(model) != before
    headwise.detach(model)
    assert _state(model) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_restores_the_attention_that_was_there(implementation: str) -> None:
    model = make("llama-gqa", attn_implementation=implementation)
    headwise.attach(model)
    assert model.config._attn_implementation == NAME
    headwise.detach(model)
    assert model.config._attn_implementation == implementation


def test_attaching_twice_is_attaching_once() -> None:
    model = make("deepseek_v3")
    first = headwise.attach(model)
    state = _state(model)
    assert headwise.attach(model) is first
    assert _state(model) == state
    headwise.detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_detaching_a_stock_model_does_nothing() -> None:
    model = make("llama-gqa")
    before = _state(model)
    headwise.detach(model)
    assert _state(model) == before


def test_attaching_one_model_leaves_another_alone() -> None:
    attached, other = make("llama-gqa"), make("llama-gqa")
    headwise.attach(attached)
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", GENERATORS)
def test_saving_an_attached_model_writes_what_stock_writes(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "stock")
    expected = _tokens(model)
    headwise.attach(model)
    model.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "attached").iterdir()) == names
    for name in names:
        ours, stock = tmp_path / "attached" / name, tmp_path / "stock" / name
        assert ours.read_bytes() == stock.read_bytes(), name
    loaded = type(model).from_pretrained(tmp_path / "attached")
    assert loaded.config._attn_implementation != NAME
    headwise.attach(loaded)
    assert torch.equal(_tokens(loaded), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_attached_on_its_own(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    twin = copy.deepcopy(model)
    headwise.detach(model)
    assert family in OWN_FORWARD or twin.config._attn_implementation == NAME
    if family in GENERATORS:
        assert twin._prepare_cache_for_generation.owner is twin
        assert torch.equal(_tokens(twin), _tokens(model))
    headwise.detach(twin)
    assert _state(twin) == _state(model)


_UNPICKLE = """
import pickle, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
prompt = torch.load(folder / "prompt")
for file in sorted(folder.glob("*.model")):
    model = pickle.loads(file.read_bytes())
    own = any("forward" in at.__dict__ for at in model.modules())
    assert own or model.config._attn_implementation == "headwise"
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)
    torch.save(tokens, file.with_suffix(".tokens"))
    import headwise
    headwise.detach(model)
    assert model.config._attn_implementation != "headwise"
    assert not any("forward" in at.__dict__ for at in model.modules())
"""


# Of each kind of what attaching leaves: latents, a window, its own forward, an encoder beside it.
PICKLED = ("llama-gqa", "gemma2", "deepseek_v3", "falcon-40b", "t5")


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(PICKLED, id="of each kind"),
        pytest.param(GENERATORS, id="all", marks=pytest.mark.sweep),
    ],
)
def test_pickled_models_work_in_a_fresh_process(families: Sequence[str], tmp_path: Path) -> None:
    expected = {}
    torch.save(PROMPT, tmp_path / "prompt")
    for family in families:
        model = make(family)
        expected[family] = _tokens(model)
        headwise.attach(model)
        (tmp_path / f"{family}.model").write_bytes(pickle.dumps(model))
    subprocess.run([sys.executable, "-c", _UNPICKLE, str(tmp_path)], check=True)
    for family, tokens in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{family}.tokens"), tokens), family


def test_an_attached_model_is_freed_as_soon_as_it_is_let_go() -> None:
    model = make("llama-gqa")
    headwise.attach(model)
    _tokens(model)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_the_report_says_per_layer_what_runs() -> None:
    report = headwise.attach(make("gpt_oss"))
    assert [layer.name for layer in report.layers] == ["decoder.0", "decoder.1", "decoder.2"]
    first = report.layers[0]
    assert first.spec is not None
    assert (first.spec.mechanism, first.spec.heads, first.spec.kv_heads) == ("GQA", 6, 2)
    assert [verdict.backend for verdict in first.decode] == ["cpu", "torch", "reference"]
    assert first.decode[0].accepted
    assert "sinks" in first.decode[1].reason
    text = str(report)
    assert "GptOssForCausalLM" in text
    assert "decoder.0" in text


def test_the_report_of_mla_shows_absorption() -> None:
    report = headwise.attach(make("deepseek_v2"))
    spec = report.layers[0].spec
    assert spec is not None
    assert spec.mechanism == "MLA"
    assert "latent and rope key held apart" in report.layers[0].decode[1].reason
    assert "head dims padded to 20" in report.layers[0].prefill[1].reason


def test_the_report_of_t5_lists_encoder_decoder_and_cross_attention() -> None:
    names = [layer.name for layer in headwise.attach(make("t5")).layers]
    assert names[:3] == ["encoder.0", "encoder.1", "encoder.2"]
    assert names[3:5] == ["decoder.0", "decoder.0.cross"]


def test_a_family_without_a_reader_is_attached_and_says_so() -> None:
    torch.manual_seed(2)
    config = hf.StableLmConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = hf.StableLmForCausalLM(config).eval()
    expected = _tokens(model)
    report = headwise.attach(model)
    assert report.layers[0].spec is None
    assert "no spec reader for 'stablelm'" in str(report)
    assert torch.equal(_tokens(model), expected)


def test_an_attention_that_a_user_sets_afterwards_is_theirs() -> None:
    model = make("llama-gqa")
    headwise.attach(model)
    model.set_attn_implementation("eager")
    headwise.detach(model)
    assert model.config._attn_implementation == "eager"
    headwise.attach(model)
    model.set_attn_implementation("eager")
    headwise.attach(model)
    assert model.config._attn_implementation == NAME
    headwise.detach(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "t5"])
def test_setting_another_attention_runs_that_one(family: str) -> None:
    model = make(family)
    expected = _tokens(model)
    headwise.attach(model)
    model.set_attn_implementation("eager")
    assert torch.equal(_tokens(model), expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_models_that_share_a_config_are_attached_and_detached_in_any_order(
    order: tuple[int, ...],
) -> None:
    model = make("deepseek_v2")
    twin = type(model)(model.config).eval()
    expected = _tokens(model), _tokens(twin)
    sharing = model, twin, model.model
    states = [_state(at) for at in sharing]
    for each in sharing:
        headwise.attach(each)
    for index in order:
        assert torch.equal(_tokens(model), expected[0])
        assert torch.equal(_tokens(twin), expected[1])
        headwise.detach(sharing[index])
    assert [_state(at) for at in sharing] == states


def _padded(model: Any) -> torch.Tensor:
    """Logits of a left-padded batch, its rows of padding too, as they may enter a loss."""
    mask = torch.ones_like(PROMPT)
    mask[:, :5] = 0
    with torch.no_grad():
        return model(PROMPT, attention_mask=mask)[0]


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_a_model_that_shares_an_eager_config_keeps_its_rows_of_padding(family: str) -> None:
    model = make(family, attn_implementation="eager")
    twin = type(model)(model.config).eval()
    expected = [_padded(each) for each in (model, twin)]
    for each in (model, twin):
        headwise.attach(each)
    for each, logits in zip((model, twin), expected, strict=True):
        torch.testing.assert_close(_padded(each), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_a_part_that_was_attached_first_stays_attached(family: str) -> None:
    model = make(family, attn_implementation="eager")
    expected = _padded(model)
    headwise.attach(model.model)
    before = _state(model)
    headwise.attach(model)
    headwise.detach(model)
    assert _state(model) == before
    torch.testing.assert_close(_padded(model), expected, atol=1e-4, rtol=1e-4)
    headwise.detach(model.model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.nn.Linear(2, 2), "given a Linear, expected a Transformers PreTrainedModel"),
        ("gpt2", "given a str, expected a Transformers PreTrainedModel"),
        (hf.GPT2LMHeadModel, "given the class GPT2LMHeadModel, expected a Transformers"),
        (
            torch.nn.ModuleDict({"one": make("gpt2"), "two": make("bert")}),
            r"holds 2 Transformers models: give one of them, .one \(GPT2LMHeadModel\), .two \(Bert",
        ),
    ],
)
def test_attach_refuses_what_is_not_a_model(bad: Any, message: str) -> None:
    for function in (headwise.attach, headwise.detach):
        with pytest.raises(headwise.UnsupportedError, match=message):
            function(bad)


def test_attach_refuses_a_model_that_is_not_on_the_interface() -> None:
    sizes = {"vocab_size": 99, "d_model": 32, "ffn_dim": 40, "num_layers": 1, "attention_heads": 4}
    model = hf.XGLMForCausalLM(hf.XGLMConfig(**sizes))
    with pytest.raises(headwise.UnsupportedError, match="XGLMForCausalLM does not take"):
        headwise.attach(model)


def test_attach_refuses_attentions_asked_for_in_the_config() -> None:
    model = make("llama-gqa", attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(headwise.UnsupportedError, match="per call"):
        headwise.attach(model)


@pytest.mark.parametrize("family", [name for name in GENERATORS if name not in OWN_FORWARD])
def test_a_refused_attach_changes_nothing(family: str) -> None:
    model = make(family, attn_implementation="eager")
    model.config.output_attentions = True
    before = _state(model)
    with pytest.raises(headwise.UnsupportedError):
        headwise.attach(model)
    assert _state(model) == before
