"""Every causal language model type of the installed Transformers, in stock and attached.

`python tests/sweep_families.py` makes a small random model of each type, runs it both ways and
writes docs/models.md. With names of types it runs these and prints their lines of that page. The
last line counts the verdicts. The exit code is 1 where anything differs or crashes.
"""

import copy
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import headwise
import headwise.hf  # for all processes
from headwise.hf.stock_names import CACHE

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
# docs/concepts/equality.md: of the largest logit, in float32
TOLERANCE = 1e-4
NEW_TOKENS = 12
SECONDS = 300
VOCABULARY, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 97, 4, 6, 2, 16

VERDICTS = {
    "equal": "Equal to stock",
    "part": "Equal to stock, with a part that stays with Transformers",
    "refused": "Refused",
    "not runnable": "Not runnable here by stock",
    "differs": "Differs from stock",
    "crashes": "Crashes",
}
_COLUMNS = ("type", "attention", "cache", "note")
EXPECTED = ("equal", "part", "refused", "not runnable")

_LAYER_COUNTS = r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers"
# What a field of a config is made, by the first pattern that its whole name matches; None keeps it.
_SIZES: dict[str, Any] = {
    r"initializer_range|init_std|initializer_factor": 0.2,
    r".*(drop|dropout|pdrop|dropout_rate|layerdrop|dropout_prob|dropout_p)": 0.0,
    r"type_vocab_size|.*kernel.*|qk_head_dim": None,
    r".*shared_experts": 1,
    r".*vocab(_size)?(_per_layer_input|_base)?": VOCABULARY,
    r".*(kv_heads|kv_n_heads|key_value_heads|query_groups|head_kv|num_key_heads)": KV_HEADS,
    r"(mamba_)?n_?groups": 2,
    r"mamba_(n|num)_heads|n_mamba_heads": 12,
    r".*head_?dim|d_head|dim_head|kv_channels|attention_head_size|mamba_d_head": HEAD_DIM,
    # enough heads that no two sums of relus are equal
    r"index_n_heads": 16,
    r"index_topk": 8,
    r".*heads?": HEADS,
    r"rotary_dim": HEAD_DIM // 2,
    r"attention_hidden_size|mamba_d_ssm": 2 * HEADS * HEAD_DIM,
    r".*(n_embd|hidden_size(_global)?|d_model|embedding_size|embed_dim|emb_dim|lru_width|proj_dim)"
    r"|embedding_dim": HEADS * HEAD_DIM,
    r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dff|dim_ff|d_inner|mid_dim|feed_forward_size"
    r"|n_inner)": 64,
    r".*(_rank|lowrank)": 20,
    r".*(state_size|d_state)": 16,
    r".*(sliding_window|window_size|window_len|local_attention)|attention_chunk_size": 7,
    r".*chunk_size": 8,
    r".*(num_experts|routed_experts|local_experts)|zero_expert_num": 4,
    r".*(experts_per_tok|experts_per_token|moe_topk|moe_top_k|moe_k)": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers": 1,
    r"attn_layer_period|global_attn_every_n_layers|no_rope_layer_interval": 2,
    r"attn_layer_offset": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|.*_extent": 256,
}
# Fields that are set although their default is None.
_WANTED = (
    r"head_dim|num_key_value_heads|num_experts_per_tok|n_(routed|shared)_experts|sliding_window"
)
_TOKENS = {"bos_token_id": 1, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
_TOKENS |= {"forced_eos_token_id": None, "forced_bos_token_id": None}
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_CONVOLUTIONS = ["conv", "full_attention", "conv", "full_attention"]
_STATES = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SLIDING_LATENTS = {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS}
_SLIDING_LATENTS |= {"swa_q_lora_rank": 20, "swa_kv_lora_rank": 20, "swa_head_dim": 32}
_SLIDING_LATENTS |= {"swa_qk_nope_head_dim": HEAD_DIM, "swa_v_head_dim": HEAD_DIM}
_INDEXER = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM}
_INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What names do not say. `...` leaves a field to its config.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_HYBRID, _ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "dory": {
        "layer_types": [*("sliding_attention", "mlp", "full_attention", "mlp"), *_HYBRID[:2]],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots3_note": _SLIDING_LATENTS,
    "dots3_note_text": _SLIDING_LATENTS,
    "gemma3n_text": {
        "layer_types": [*_HYBRID, "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": None,
    },
    "granitemoehybrid": {"layer_types": _STATES},
    # its loops magnify rounding
    "hrm_text": {"initializer_range": 0.1},
    "lfm2": {"layer_types": _CONVOLUTIONS, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS},
    "mamba2": {"num_heads": 12},
    "mimo_v2_flash": {"num_attention_heads": 8},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False, "num_buckets": 4},
    "rwkv": {"attention_hidden_size": HEADS * HEAD_DIM},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},
    "zamba": {"layers_block_type": _SHARED, "n_mamba_heads": 2, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": _SHARED, "attention_head_dim": 32, "kv_channels": 32},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass
class Row:
    """What came of one type: a verdict of `VERDICTS`, and why."""

    name: str
    verdict: str
    reason: str = ""
    attention: str = ""
    cache: str = ""

    def line(self) -> str:
        """Its line of the page."""
        parts = [self.name, self.attention, self.cache, self.reason]
        if self.verdict != "equal":
            parts = [self.name, self.reason]
        return (
            "| " + " | ".join(" ".join(part.split()).replace("|", "\\|") for part in parts) + " |"
        )


def make(name: str) -> Any:
    """The small random model of a type, the same at every call."""
    class_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    first = class_names if isinstance(class_names, str) else class_names[0]
    model_class = getattr(transformers, first)
    kind = CONFIG_MAPPING[name]
    # a decoder's own config, of what also has other parts
    decoders = [part for part in kind.sub_configs.values() if part is model_class.config_class]
    kind = decoders[0] if decoders else kind
    config = kind(**small(kind, _CHANGES.get(name, {})))
    torch.manual_seed(11)
    model = model_class(config).eval()
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        # of zeros, every key would have the same score, and any choice would be right
        torch.nn.init.normal_(embedding.weight.data[embedding.padding_idx], std=0.2)
    if name == "xmod":
        model.set_default_language("en_XX")
    return model


def small(kind: type[PretrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config that has every kind of layer of its default, few and narrow ones."""
    default = kind()
    fields = {name: at for name, at in vars(default).items() if not name.startswith("_")}
    counts = [n for name, n in fields.items() if re.fullmatch(_LAYER_COUNTS, name)]
    total = counts[0] if counts else 0
    lists = {
        name: at
        for name, at in fields.items()
        # numbers of layers are none of their kinds
        if isinstance(at, list | tuple) and len({*map(repr, at)}) < len(at) == total
    }
    if "sliding_window" in fields and set(lists.get("layer_types", [])) == {"full_attention"}:
        changes = {"layer_types": _HYBRID, **changes}
    kept = _kept(lists, total)
    sizes = {name: [at[index] for index in kept] for name, at in lists.items()}
    for name, at in fields.items():
        if isinstance(at, PretrainedConfig):
            sizes[name] = small(type(at), changes.get(name, {}))
        elif re.fullmatch(_LAYER_COUNTS, name):
            sizes[name] = len(changes.get("layer_types", kept))
        elif name in _TOKENS:
            sizes[name] = _TOKENS[name]
        elif name in ("is_decoder", "use_sliding_window"):
            sizes[name] = True
        elif name not in lists:
            sizes[name] = _size(name, at)
    if sizes.get("kv_lora_rank"):  # expanded, each head has keys of its own
        sizes |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in sizes else {}
    parts = {name for name, at in fields.items() if isinstance(at, PretrainedConfig)}
    sizes |= {name: at for name, at in changes.items() if name not in parts}
    return {name: at for name, at in sizes.items() if at is not ...}


def _kept(lists: dict[str, Any], total: int) -> list[int]:
    """The layers that are kept: the first of each kind, then others from the front."""
    kinds = {repr(kind): index for index, kind in reversed([*enumerate(zip(*lists.values()))])}
    chosen = list(dict.fromkeys([*kinds.values(), *range(total)]))
    return sorted(chosen[: max(LAYERS, len(kinds))])


def _size(name: str, value: Any) -> Any:
    """What a field of this name and default is made; `...` where it stays."""
    if isinstance(value, bool | str | list | tuple | dict):
        return ...
    size = next((at for pattern, at in _SIZES.items() if re.fullmatch(pattern, name)), None)
    if size is None or value == 0 or (value is None and not re.fullmatch(_WANTED, name)):
        return ...
    return size


_GENERATOR = torch.Generator().manual_seed(3)
_PROMPT = torch.randint(3, VOCABULARY, (1, 19), generator=_GENERATOR)
_BATCH = torch.randint(3, VOCABULARY, (2, 19), generator=_GENERATOR)
_SEEN = torch.ones_like(_BATCH)
_SEEN[0, :8] = 0
_BATCH[_SEEN == 0] = 0
_PADDED = {"input_ids": _BATCH, "attention_mask": _SEEN}
MODES: dict[str, dict[str, Any]] = {
    "prompt": {"input_ids": _PROMPT},
    "left-padded batch": _PADDED,
    "static cache": {"input_ids": _PROMPT, "cache_implementation": "static"},
    "three beams": {**_PADDED, "num_beams": 3},
}


def generated(model: Any, mode: str) -> Any:
    """The sequences that a model generates greedily, and the logits of each step."""
    # a copy: what a model keeps of a run (frequencies, a length) is no business of the next one
    return copy.deepcopy(model).generate(
        **MODES[mode],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def difference(stock: Any, ours: Any) -> tuple[str, bool]:
    """How two runs differ, and whether it is an error: a near tie of tokens is none."""
    start = stock.sequences.shape[1] - len(stock.logits)
    for step, (expected, given) in enumerate(zip(stock.logits, ours.logits)):
        scale = expected[expected.isfinite()].abs().max()
        near = torch.isclose(given, expected, rtol=0, atol=TOLERANCE * float(scale))
        if not bool(near.all()):
            error = float((given - expected)[~near].abs().max() / scale)
            return f"logits of step {step} by {error:.0e} of the largest", True
        at = start + step
        if not torch.equal(stock.sequences[:, : at + 1], ours.sequences[:, : at + 1]):
            best = expected.topk(2).values
            gap = float((best[:, 0] - best[:, 1]).min() / scale)
            return (
                f"tokens of step {step}, whose best two logits are {gap:.0e} apart",
                gap > TOLERANCE,
            )
    return ("", False) if torch.equal(stock.sequences, ours.sequences) else ("sequences", True)


def nearer(model: Any, mode: str, stock: Any, ours: Any) -> bool:
    """Whether our logits are as near to those in float64 as stock's own are, at every step."""
    exact = copy.deepcopy(model)
    headwise.detach(exact)
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the others take no float64
    try:
        new, steps = _alone(exact.double(), MODES[mode])
    except RuntimeError:
        return False  # what casts to float32
    if not all(torch.equal(new, other.sequences[:, -NEW_TOKENS:]) for other in (stock, ours)):
        return False
    for logits in zip(steps, stock.logits, ours.logits, strict=True):
        expected, theirs, own = (each[logits[0].isfinite()].double() for each in logits)
        bound = max(TOLERANCE * expected.abs().max(), (theirs - expected).abs().max())
        if not (own - expected).abs().max() <= bound:
            return False
    return True


def _alone(model: Any, given: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The new tokens and the logits of each step, of every sequence without its padding.

    Rows of padding are NaN in some families' eager attention in float64, and reach the others.
    """
    options = {name: value for name, value in given.items() if name not in _PADDED}
    ids = given["input_ids"]
    seen = given.get("attention_mask", torch.ones_like(ids)).bool()
    runs = [
        copy.deepcopy(model).generate(
            row[kept][None],
            **options,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for row, kept in zip(ids, seen, strict=True)
    ]
    steps = [torch.cat(logits) for logits in zip(*(run.logits for run in runs), strict=True)]
    return torch.cat([run.sequences[:, -NEW_TOKENS:] for run in runs]), steps


def verdict(name: str) -> Row:
    """Run one type both ways."""
    expected: dict[str, Any] = {}
    without: list[str] = []
    try:
        model = make(name)
        expected["prompt"] = generated(model, "prompt")
        itself, _ = difference(expected["prompt"], generated(model, "prompt"))
        if itself:
            return Row(name, "not runnable", f"stock differs from itself: {itself}")
    except Exception as error:  # noqa: BLE001 - whatever stock has not, or needs
        return Row(name, "not runnable", _words(error))
    for mode in list(MODES)[1:]:
        try:
            expected[mode] = generated(model, mode)
        except Exception:  # noqa: BLE001
            without.append(mode)
    try:
        report = headwise.attach(model)
        given = {mode: generated(model, mode) for mode in expected}
    except headwise.UnsupportedError as error:
        kind = "refused" if "_headwise" not in model.__dict__ else "crashes"
        return Row(name, kind, str(error).removeprefix(type(model).__name__).lstrip(": "))
    except Exception as error:  # noqa: BLE001 - a crash of ours is a row
        traceback.print_exc()
        return Row(name, "crashes", _words(error))
    notes = [f"not {', '.join(without)}, which stock refuses"] if without else []
    for mode, run in given.items():
        what, wrong = difference(expected[mode], run)
        if wrong and nearer(model, mode, expected[mode], run):
            continue
        if wrong:
            return Row(name, "differs", f"{mode}: {what}")
        if what:
            notes.append(f"{mode}: a near tie, {what}")
    if "_prepare_cache_for_generation" in model.__dict__:
        try:
            wrong_memory, why = remembering(model)
        except Exception as error:  # noqa: BLE001 - a crash of ours is a row
            traceback.print_exc()
            return Row(name, "crashes", f"what is remembered: {_words(error)}")
        if wrong_memory:
            return Row(name, "differs", f"{wrong_memory} ({why})")
        if os.environ.get("HEADWISE_SWEEP_WHY"):
            print(f"{name}: {why or 'remembers'}", flush=True)
    left = dict.fromkeys(layer.note for layer in report.layers if layer.stock)
    kinds = dict.fromkeys(
        layer.what or _kind(layer.spec) for layer in report.layers if not layer.stock
    )
    if left:
        return Row(name, "part", "; ".join([*left, *notes]))
    return Row(name, "equal", "; ".join(notes), "; ".join(kinds), report.cache)


def remembering(model: Any) -> tuple[str, str]:
    """What is wrong with what an attached model remembers, or saves; and why it does not do so."""
    given: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    given["return_dict_in_generate"] = True
    more = _BATCH[1:, :9]
    with tempfile.TemporaryDirectory() as folder:
        ours = copy.deepcopy(model)
        remembered = headwise.attach(ours, remember=folder).remembered
        ids, why = _PROMPT, ""
        for turn in range(3):
            # of no mask Transformers makes one, which hides tokens that are the padding's
            given["attention_mask"] = torch.ones_like(ids)
            expected = copy.deepcopy(model).generate(ids, **given)
            found = ours.generate(ids, **given)
            known = (0, ids.shape[1] - 1, ids.shape[1] - more.shape[1] - 1)[turn]
            why = "; ".join(remembered.notes)
            if not torch.equal(found.sequences, expected.sequences):
                return f"turn {turn} of what is remembered: other tokens", why
            if not why and remembered.known != known:
                return f"turn {turn}: {remembered.known} tokens are known, not {known}", why
            if turn:
                ids = torch.cat([expected.sequences, more], dim=1)
        try:
            headwise.save_cache(found.get(CACHE), f"{folder}/cache")
        except headwise.UnsupportedError as error:
            return "", f"{why}; not saved: {error}"
        loaded = headwise.load_cache(f"{folder}/cache", ours)
        if all(loaded.is_linear) or "in parts" in why:
            return "", why  # which no cache of Transformers goes on from
        given["attention_mask"] = torch.ones_like(ids)
        expected = copy.deepcopy(model).generate(ids, **given)
        tokens = ours.generate(ids, **given, **{CACHE: loaded}).sequences
        return "" if torch.equal(tokens, expected.sequences) else "the loaded cache", why


def _words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:160]


def _kind(spec: Any) -> str:
    if spec is None:
        return "read from each call"
    labels = {
        "cross-attention": spec.cross,
        "bidirectional": not spec.causal and not spec.cross,
        "window": spec.window is not None,
        "softcap": spec.softcap is not None,
        "sinks": spec.sinks,
        "ALiBi": spec.alibi,
        "relative bias": spec.relative_bias,
        "QK-norm": spec.qk_norm,
        "compressed queries": spec.query_rank is not None,
    }
    return " ".join([spec.mechanism, *(label for label, present in labels.items() if present)])


def sweep(names: Iterable[str], processes: int) -> Iterator[Row]:
    """The rows of types in any order, each from a process of its own."""
    context = multiprocessing.get_context("fork")  # which has imported everything already
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            end, child_end = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, child_end))
            process.start()
            child_end.close()
            running[name] = process, end, time.monotonic() + SECONDS
        for name, (process, end, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if not end.poll(0.05) and not late:
                continue
            try:
                row = Row(name, "crashes", f"took more than {SECONDS} s") if late else end.recv()
            except EOFError:
                row = Row(name, "crashes", "its process ended")
            process.kill()
            process.join()
            del running[name]
            yield row


def _child(name: str, end: Any) -> None:
    os.dup2(2, 1)  # what a model prints is no line of ours
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        end.send(verdict(name))


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    from families import FAMILIES
    from hf.test_attach_generation import MODES as TESTED
    from hf.test_attach_generation import modes_without

    text = [
        "# Models",
        f"`python tests/sweep_families.py` made this page with Transformers "
        f"{transformers.__version__}. It attaches a small random\nmodel of every causal language "
        f"model type that Transformers has ({', '.join(MODES)}), and compares\ntokens and logits "
        "with stock ([what equal means](concepts/equality.md)).",
        f"{counts(rows)}.",
    ]
    for kind, title in VERDICTS.items():
        lines = [
            row.line() for row in sorted(rows, key=lambda row: row.name) if row.verdict == kind
        ]
        if lines:
            columns = _COLUMNS if kind == "equal" else _COLUMNS[:1] + _COLUMNS[-1:]
            table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]
            text += [f"## {title}", "\n".join(table)]
    modes = []
    for mode in TESTED:
        without = ", ".join(modes_without(mode))
        modes.append(f"- {mode}" + (f"; not {without}, where stock refuses" if without else ""))
    text += [
        "## Tested further",
        f"The tests also train, save, copy, pickle and compile models of these families: "
        f"{', '.join(FAMILIES)}.\nThose that generate do so in these modes:",
        "\n".join(modes),
        "Where the attention of a type is read from each call, headwise has no reader of its "
        "config: [add one](extending/family.md).",
    ]
    return "\n\n".join(text) + "\n"


def counts(rows: list[Row]) -> str:
    """How many of each verdict, in words."""
    number = Counter(row.verdict for row in rows)
    equal = number["equal"] + number["part"]
    others = ", ".join(f"{number[kind]} {kind}" for kind in [*VERDICTS][2:])
    return f"{len(rows)} types: {equal} equal (of {number['part']} a part stays stock), {others}"


def main(names: list[str]) -> int:
    """Run the sweep; 1 where anything differs or crashes."""
    torch.set_num_threads(1)
    rows = []
    for row in sweep(names or TYPES, os.cpu_count() or 1):
        rows.append(row)
        print(row.line() if names else f"{row.name}: {row.verdict} {row.reason}", flush=True)
    if not names:
        PAGE.write_text(page(rows), encoding="utf-8")
    print(counts(rows))
    return int(any(row.verdict not in EXPECTED for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
