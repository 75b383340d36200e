"""A damaged GGUF file ends in one line that names it, whatever is damaged."""

import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from headwise.base.progress import silent
from headwise.errors import HeadwiseError, LoadError
from headwise.loading.gguf.conversion import read_config, write_folder
from headwise.loading.gguf.file import read_header

TOKENS = ["<s>", "</s>", "a", "b", "ab"]


def write_smallest(path: Path, *, merges: str = "a b", **fields: Any) -> Path:
    """One layer of a Llama of width 16."""
    rng = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, "llama")
    said = {
        "context_length": 64,
        "embedding_length": 16,
        "block_count": 1,
        "feed_forward_length": 24,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 8,
        "vocab_size": len(TOKENS),
    }
    for name, value in (said | fields).items():
        key = name if name.startswith(("tokenizer.", "general.")) else f"llama.{name}"
        writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges([merges])
    shapes = {"token_embd": (5, 16), "output_norm": (16,), "output": (5, 16)}
    layer = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    layer |= {"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    layer |= {"attn_norm": (16,), "ffn_norm": (16,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


DAMAGED: dict[str, dict[str, Any]] = {
    "heads that do not divide the width": {"attention.head_count": 3},
    "no heads": {"attention.head_count": 0},
    "a size that the tensors do not have": {"feed_forward_length": 56},
    "merges outside the vocabulary": {"merges": "x y"},
    "a padding token outside the vocabulary": {"tokenizer.ggml.padding_token_id": 5},
    "an end token outside the vocabulary": {"tokenizer.ggml.eos_token_id": 2**31},
    "no alignment": {"general.alignment": 0},
    "a rotation of four billion dims": {"rope.dimension_count": 2**32 - 2},
    "a width of four billion": {"embedding_length": 2**32 - 2},
    "a vocabulary of four billion": {"vocab_size": 2**32 - 1},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_header_that_cannot_be_is_one_line(tmp_path: Path, damage: str) -> None:
    file = write_smallest(tmp_path / "model.gguf", **DAMAGED[damage])
    (tmp_path / "out").mkdir()
    with pytest.raises(LoadError) as caught:
        write_folder(file, tmp_path / "out", silent)
    text = str(caught.value)
    assert "\n" not in text and str(file) in text


def mutated(data: bytes, head: int, rng: random.Random) -> bytes:
    """Bits flipped, bytes set, cut out or cut off, in the header."""
    changed, kind = bytearray(data), rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        at, extreme = rng.randrange(4, head - 8), rng.choice((b"\0", b"\xff", b"\x7f"))
        changed[at : at + 8] = extreme * 8
    elif kind == 2:
        at = rng.randrange(4, head)
        del changed[at : at + rng.choice((1, 4, 8))]
    else:
        for _ in range(rng.choice((1, 2, 4))):
            changed[rng.randrange(head)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_200_damaged_files_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = write_smallest(tmp_path / "whole.gguf")
    data, head = whole.read_bytes(), read_header(whole).header.data_start
    rng, refusals = random.Random(23), []
    file, out = tmp_path / "damaged.gguf", tmp_path / "out"
    for _ in range(200):
        file.unlink(missing_ok=True)
        file.write_bytes(mutated(data, head, rng))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            read_config(file)
            write_folder(file, out, silent)
        except HeadwiseError as error:
            refusals.append((str(error), list(out.iterdir())))
    assert not [text for text, written in refusals if "\n" in text or written]
    assert len(refusals) > 150  # most bytes of a header mean something
