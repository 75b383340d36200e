import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from headwise.conversion.tuning.distillation import Tuning, distil
from headwise.conversion.tuning.losses import backward
from headwise.errors import ConversionError, LoadError, OptionError
from headwise.hf import HeadwiseMlaConfig, HeadwiseMlaForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "initializer_range": 0.2,
}
LATENT = {
    "kv_lora_rank": [14, 10, 12],
    "qk_rope_head_dim": [4, 8, 6],
    "qk_nope_head_dim": [8, 8, 8],
    "v_head_dim": 8,
    "attention_scale": 8**-0.5,
}
STUDENTS = {
    "gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "bias": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "mla": lambda: HeadwiseMlaForCausalLM(HeadwiseMlaConfig(**SIZES, **LATENT)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread only waits for the first in matrices this small, 10 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def teacher() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=3)).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(97, (11, 29))


def student_of(teacher: Any, kind: str = "gqa") -> Any:
    """Another attention in the teacher's model, without what a conversion would carry over."""
    student = STUDENTS[kind]()
    carried = {
        name: tensor for name, tensor in teacher.state_dict().items() if ".self_attn." not in name
    }
    student.load_state_dict(carried, strict=False)
    return student.eval()


def whole_losses(teacher: Any, student: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The two losses from whole logits, and from attention outputs that stock collects."""

    def read(model: Any) -> tuple[Any, list[Tensor]]:
        outputs: list[Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
            for layer in model.model.layers
        ]
        logits = model(tokens).logits.float()
        for hook in hooks:
            hook.remove()
        return torch.distributions.Categorical(logits=logits), outputs

    with torch.no_grad():
        expected, wanted = read(teacher)
    actual, got = read(student)
    divergence = torch.distributions.kl_divergence(expected, actual).mean()
    shares = [
        torch.dist(ours, theirs) ** 2 / theirs.norm() ** 2
        for ours, theirs in zip(got, wanted, strict=True)
    ]
    return divergence, sum(shares) / len(shares)


@pytest.mark.parametrize("kind", STUDENTS)
def test_tuning_brings_the_student_nearer_to_its_teacher_on_other_text(
    kind: str, teacher: Any
) -> None:
    student, text = student_of(teacher, kind), torch.randint(97, (327, 29))
    tokens, other = text[:320], text[320:]
    with torch.no_grad():
        before = whole_losses(teacher, student, other)
    tuning = Tuning(steps=40, batch=8, learning_rate=0.1, attention_weight=1.0)
    distil(teacher, student, tokens, tuning)
    with torch.no_grad():
        after = whole_losses(teacher, student, other)
    assert after[0] < 0.85 * before[0]
    assert after[1] < 0.85 * before[1]


def test_losses_and_gradients_are_those_of_whole_logits(teacher: Any) -> None:
    tokens = torch.randint(97, (5, 31))  # 155 positions: two slices, the second shorter
    student = student_of(teacher)
    ours, theirs = student, deepcopy(student)
    divergence, attention = backward(teacher, ours, tokens, 0.7)
    expected = whole_losses(teacher, theirs, tokens)
    (expected[0] + 0.7 * expected[1]).backward()
    assert divergence == pytest.approx(expected[0].item(), rel=1e-5)
    assert attention == pytest.approx(expected[1].item(), rel=1e-5)
    for (name, parameter), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (parameter.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < 1e-4, name  # sums of 155 positions in another order, in float32


def test_logits_are_made_for_few_positions_at_a_time(teacher: Any) -> None:
    student, rows = student_of(teacher), []
    for model in (teacher, student):
        model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    backward(teacher, student, torch.randint(97, (5, 31)), 1.0)
    assert max(rows) <= 128
    assert sum(rows) == 2 * 5 * 31


def test_only_the_attention_is_trained_by_default(teacher: Any, tokens: Tensor) -> None:
    student = student_of(teacher)
    before = deepcopy(student.state_dict())
    distil(teacher, student, tokens, Tuning(steps=2))
    changed = {
        name for name, tensor in student.state_dict().items() if not tensor.equal(before[name])
    }
    assert changed == {name for name in before if ".self_attn." in name}


def test_parameters_are_trained_by_choice(teacher: Any, tokens: Tensor) -> None:
    student = student_of(teacher)
    before = deepcopy(student.state_dict())
    names = {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    distil(teacher, student, tokens, Tuning(steps=2), trained=names.__contains__)
    assert {
        name for name, tensor in student.state_dict().items() if not tensor.equal(before[name])
    } == names


def test_nothing_but_weights_is_left_behind(teacher: Any, tokens: Tensor) -> None:
    student = student_of(teacher)
    student.model.norm.weight.requires_grad_(False)
    distil(teacher, student, tokens, Tuning(steps=2))
    fixed = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert fixed == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(
        module._forward_hooks for model in (teacher, student) for module in model.modules()
    )


def test_gradients_from_before_do_not_count(teacher: Any, tokens: Tensor) -> None:
    clean = student_of(teacher)
    used = deepcopy(clean)
    used(tokens, labels=tokens).loss.backward()
    for student in (clean, used):
        distil(teacher, student, tokens, Tuning(steps=1))
    assert same_bits(clean, used)


def test_each_sequence_is_met_once_before_any_is_met_again(teacher: Any) -> None:
    tokens = torch.arange(5)[:, None].expand(5, 3).contiguous()
    met: list[int] = []
    teacher.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: met.extend(inputs[0][:, 0].tolist())
    )
    distil(teacher, student_of(teacher), tokens, Tuning(steps=5, batch=2))
    assert sorted(met[:5]) == sorted(met[5:]) == [0, 1, 2, 3, 4]
    assert met[:5] != met[5:]


def test_a_bfloat16_student_is_trained_in_float32(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher).bfloat16()
    distil(teacher.bfloat16(), student, tokens, Tuning(steps=3), folder=tmp_path / "kept")
    name = "model.layers.1.self_attn.v_proj.weight"
    master = load_file(tmp_path / "kept" / "step-3" / "state.safetensors")[f"{name}.weight"]
    weight = student.state_dict()[name]
    assert weight.dtype == torch.bfloat16
    assert master.dtype == torch.float32
    assert weight.equal(master.bfloat16())
    assert not master.equal(weight.float())  # the rest of 24 bits is not lost between steps


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(ours.equal(theirs) for ours, theirs in pairs)


class Interrupt:
    """A progress that Ctrl-C meets once `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_an_interrupted_tuning_ends_with_the_bits_of_one_that_was_not(
    kind: str, dtype: torch.dtype, teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    teacher, first = teacher.to(dtype), student_of(teacher, kind).to(dtype)
    second, third = deepcopy(first), deepcopy(first)
    tuning, folder = Tuning(steps=9), tmp_path / "kept"
    whole = distil(teacher, first, tokens, tuning)
    with pytest.raises(KeyboardInterrupt):
        distil(
            teacher,
            second,
            tokens,
            tuning,
            folder=folder,
            save_seconds=0.0,
            progress=Interrupt(step=5),
        )
    seen: list[int] = []
    resumed = distil(
        teacher, third, tokens, tuning, folder=folder, progress=lambda *call: seen.append(call[1])
    )
    assert seen == [5, 6, 7, 8, 9]
    assert resumed == whole
    assert same_bits(third, first)


def test_a_finished_tuning_is_taken_from_its_folder(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    first = student_of(teacher)
    second = deepcopy(first)
    done = distil(teacher, first, tokens, Tuning(steps=3), folder=tmp_path)
    seen: list[int] = []
    again = distil(
        teacher,
        second,
        tokens,
        Tuning(steps=3),
        folder=tmp_path,
        progress=lambda *call: seen.append(call[1]),
    )
    assert seen == [3]
    assert again == done
    assert same_bits(first, second)


def test_one_state_is_kept_and_only_as_often_as_asked(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    names: list[list[str]] = []

    def progress(stage: str, done: int, total: int) -> None:
        names.append(sorted(path.name for path in tmp_path.iterdir()))

    student = student_of(teacher)
    again = deepcopy(student)
    distil(teacher, student, tokens, Tuning(steps=2), folder=tmp_path, progress=progress)
    assert names == [[], [], ["step-2"]]  # well before 120 seconds
    names.clear()
    tuning = Tuning(steps=2, seed=3)
    (tmp_path / "step-2").rename(tmp_path / "other")
    distil(teacher, again, tokens, tuning, folder=tmp_path, save_seconds=0.0, progress=progress)
    assert names == [["other"], ["other", "step-1"], ["other", "step-2"]]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("steps 3, now 4", {"steps": 4}),
        ("batch 1, now 3", {"batch": 3}),
        ("learning_rate 0.001, now 0.02", {"learning_rate": 0.02}),
        ("attention_weight", {"attention_weight": 0.5}),
        ("seed 0, now 1", {"seed": 1}),
    ],
)
def test_the_folder_of_another_tuning_is_refused(
    field: str, changes: dict[str, Any], teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher)
    again = deepcopy(student)
    distil(teacher, student, tokens, Tuning(steps=3), folder=tmp_path)
    with pytest.raises(OptionError, match=rf"{field}.*\bremove the folder") as caught:
        distil(teacher, again, tokens, Tuning(**{"steps": 3} | changes), folder=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", ["tokens", "teacher", "student"])
def test_the_folder_of_other_data_is_refused(
    changed: str, teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher)
    again = deepcopy(student)
    distil(teacher, student, tokens, Tuning(steps=1), folder=tmp_path)
    with torch.no_grad():
        if changed == "tokens":
            tokens[10, 28] = (tokens[10, 28] + 1) % 97
        else:
            model = teacher if changed == "teacher" else again
            model.model.layers[2].self_attn.o_proj.weight[47, 47] += 1
    with pytest.raises(OptionError, match=rf"\({changed} \w+, now \w+\)"):
        distil(teacher, again, tokens, Tuning(steps=1), folder=tmp_path)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_damaged_state_is_one_line(
    file: str, teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher)
    again = deepcopy(student)
    distil(teacher, student, tokens, Tuning(steps=1), folder=tmp_path)
    path = tmp_path / "step-1" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoadError, match=r"step-1 cannot be read.* to restart"):
        distil(teacher, again, tokens, Tuning(steps=1), folder=tmp_path)


def test_a_state_without_an_identity_is_damaged(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher)
    again = deepcopy(student)
    distil(teacher, student, tokens, Tuning(steps=1), folder=tmp_path)
    (tmp_path / "step-1" / "state.json").write_text(json.dumps({"losses": []}))
    with pytest.raises(LoadError, match="cannot be read"):
        distil(teacher, again, tokens, Tuning(steps=1), folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    (tmp_path / "file").touch()
    student = student_of(teacher)
    before = deepcopy(student)
    with pytest.raises(LoadError, match="cannot keep the tuning in"):
        distil(teacher, student, tokens, Tuning(steps=1), folder=tmp_path / "file")
    assert same_bits(student, before)


def test_a_loss_that_is_not_finite_stops_with_the_weights_before_it(
    teacher: Any, tokens: Tensor, tmp_path: Any
) -> None:
    student = student_of(teacher)
    student.model.layers[1].mlp.up_proj.weight.data[5, 7] = torch.inf
    before = deepcopy(student)
    with pytest.raises(ConversionError, match=r"step 1 of 3.* not finite") as caught:
        distil(teacher, student, tokens, Tuning(steps=3), folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert same_bits(student, before)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_steps_and_names_the_divergence(teacher: Any, tokens: Tensor) -> None:
    told: list[tuple[str, int, int]] = []
    tuned = distil(
        teacher,
        student_of(teacher),
        tokens,
        Tuning(steps=21),
        progress=lambda *call: told.append(call),
    )
    assert [(done, total) for _, done, total in told] == [(step, 21) for step in range(22)]
    assert {stage for stage, done, _ in told if done < 2} == {"tuning"}
    first = sum(divergence for divergence, _ in tuned[:2]) / 2
    assert {stage for stage, done, _ in told if done in (2, 3)} == {
        f"tuning, {first:.3f} nats per token from the original"
    }
    assert len({stage for stage, _, _ in told}) == 11


def test_training_nothing_is_refused(teacher: Any, tokens: Tensor) -> None:
    with pytest.raises(OptionError, match="no parameter"):
        distil(teacher, student_of(teacher), tokens, Tuning(steps=1), trained=lambda name: False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"attention_weight": -1.0},
        {"attention_weight": float("inf")},
    ],
)
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} is "):
        Tuning(**{"steps": 1} | wrong)
