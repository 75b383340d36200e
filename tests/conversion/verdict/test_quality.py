"""Quality on held-out text: known perplexities, agreement, and what is kept of the original."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.conversion.verdict import quality
from headwise.conversion.verdict.quality import Judge
from headwise.errors import ConversionError

VOCABULARY, SEQUENCES, LENGTH = 53, 3, 37


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    eos_token_id = None

    def decode(self, tokens: list[int], **options: object) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=127,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(model, tokens) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    assert Judge(model, Numbers(), tokens).original.perplexity == pytest.approx(VOCABULARY)


def test_perplexity_is_that_of_whole_sequences_without_a_cache(
    model, tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_SLICE", 7)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1]
    nats = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    judge = Judge(model, Numbers(), tokens)
    assert judge.original.perplexity == pytest.approx(nats.exp().item(), rel=1e-4)
    assert judge.positions == SEQUENCES * (LENGTH - 1)


def test_a_model_agrees_with_itself_and_another_where_its_likeliest_token_is_the_same(
    model, tokens
) -> None:
    judge = Judge(model, Numbers(), tokens)
    assert judge.judge(model) == judge.original
    assert judge.original.agreement == 1
    with torch.no_grad():
        before = model(tokens).logits[:, :-1].argmax(-1)
        # one token is never the likeliest now
        taken = int(before.flatten().mode().values)
        model.lm_head.weight[taken] = 0
        after = model(tokens).logits[:, :-1].argmax(-1)
    expected = (before == after).double().mean().item()
    assert 0 < expected < 1
    assert judge.judge(model).agreement == pytest.approx(expected)


def test_nothing_of_the_original_is_kept_but_its_likeliest_tokens(model, tokens) -> None:
    judge = Judge(model, Numbers(), tokens)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(judge).values())
    sizes = [value.numel() for value in vars(judge).values() if isinstance(value, torch.Tensor)]
    assert max(sizes) == tokens.numel()


def test_the_prompt_is_held_out_text_and_its_continuation_greedy(model, tokens) -> None:
    judge = Judge(model, Numbers(), tokens)
    prompt = tokens[:1, :32]
    assert judge.prompt == Numbers().decode(prompt[0].tolist())
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=48
    )
    assert judge.original.continuation == Numbers().decode(made[0, 32:].tolist())


def test_a_continuation_ends_with_the_text(model, tokens) -> None:
    whole = Judge(model, Numbers(), tokens).original.continuation.split()
    tokenizer = Numbers()
    tokenizer.eos_token_id = int(whole[5])
    cut = Judge(model, tokenizer, tokens).original.continuation.split()
    assert cut == whole[: whole.index(whole[5])]


def test_logits_that_are_no_numbers_are_refused_with_the_models_name(model, tokens) -> None:
    judge = Judge(model, Numbers(), tokens)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ConversionError, match="the tuned model's logits are not numbers"):
        judge.judge(model, "tuned")


def test_progress_counts_the_sequences(model, tokens) -> None:
    seen: list[tuple[str, int, int]] = []
    judge = Judge(model, Numbers(), tokens, lambda *call: seen.append(call))
    judge.judge(model)
    stages = [f"judging the {name} model" for name in ("original", "converted")]
    assert seen == [(stage, done, SEQUENCES) for stage in stages for done in range(SEQUENCES)]
