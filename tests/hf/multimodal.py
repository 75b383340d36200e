"""Small random models that see images or hear, and inputs as their processors would make them.

Two rows, the first padded on the left. Image and audio tokens stand in `input_ids` where a
processor puts them, as many as the tower and its projection make.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, IMAGE, START, END, OTHER = 120, 110, 111, 112, 113
_PADDING = 4
Case = tuple[Any, dict[str, Tensor]]

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
_MROPE = TEXT | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.2,
}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "projection_dim": 48}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "head_dim": 8}
# Qwen's: an image of 4 x 4 patches, merged by fours
_GRID: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 48,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "initializer_range": 0.2,
}
_AUDIO: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 16}
_IMAGE_ID: dict[str, Any] = {"image_token_id": IMAGE, "tie_word_embeddings": False}
_IMAGE_INDEX: dict[str, Any] = {"image_token_index": IMAGE, "tie_word_embeddings": False}


def _tokens(seen: int, text: int = 9, frame: bool = False) -> dict[str, Tensor]:
    """Ids with `seen` tokens of an image or a sound in each row, and the mask of the padding."""
    draw = torch.Generator().manual_seed(5)
    middle = [START, *[IMAGE] * seen, END] if frame else [IMAGE] * seen
    start = torch.tensor([1, 5, *middle])
    rows = torch.stack([torch.cat([start, torch.randint(3, 99, (text,), generator=draw)])] * 2)
    rows[1, -text:] = torch.randint(3, 99, (text,), generator=draw)
    padding = torch.zeros(1, _PADDING, dtype=torch.int64)
    more = torch.randint(3, 99, (1, _PADDING), generator=draw)
    ids = torch.cat([torch.cat([padding, rows[:1]], 1), torch.cat([rows[1:], more], 1)])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


_PIXELS = {"pixel_values": _noise(2, 3, 28, 28)}


def _types(inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return inputs | {name: (inputs["input_ids"] == IMAGE).long()}


def _llava(text: str, tower: dict[str, Any], **changes: Any) -> Case:
    text_config = TEXT | {"model_type": text}
    changes |= {"text_config": text_config, "vision_config": dict(tower)}
    config = hf.LlavaConfig(**_IMAGE_INDEX | changes)
    return hf.LlavaForConditionalGeneration(config), _tokens(16) | _PIXELS


def _pixtral() -> Case:
    whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model, inputs = _llava("mistral", _PIXTRAL, **whole)
    return model, inputs | {"image_sizes": torch.tensor([[28, 28]] * 2)}


def _llava_next() -> Case:
    config = hf.LlavaNextConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=dict(_CLIP),
        image_grid_pinpoints=[[28, 56], [56, 28]],
        **_IMAGE_INDEX,
    )
    # the whole image, and two tiles beside each other with a mark after each of their 4 rows
    inputs = _tokens(16 + 4 * (8 + 1)) | {"pixel_values": _noise(2, 3, 3, 28, 28)}
    sizes = torch.tensor([[28, 56]] * 2)
    return hf.LlavaNextForConditionalGeneration(config), inputs | {"image_sizes": sizes}


def _paligemma() -> Case:
    config = hf.PaliGemmaConfig(
        text_config=TEXT | {"model_type": "gemma"},
        vision_config=dict(_SIGLIP),
        projection_dim=48,
        hidden_size=48,
        **_IMAGE_INDEX,
    )
    inputs = _tokens(16) | _PIXELS
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    return hf.PaliGemmaForConditionalGeneration(config), inputs | types


_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def _gemma3() -> Case:
    config = hf.Gemma3Config(
        text_config=TEXT
        | {"sliding_window": 7, "query_pre_attn_scalar": 13, "layer_types": list(_KINDS)},
        vision_config=dict(_SIGLIP),
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        **_IMAGE_INDEX,
    )
    inputs = _types(_tokens(4, frame=True), "token_type_ids")
    return hf.Gemma3ForConditionalGeneration(config), inputs | _PIXELS


def _gemma4() -> Case:
    config = hf.Gemma4Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 5,
            "layer_types": [*_KINDS, "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "global_head_dim": 12,
            "num_global_key_value_heads": 3,
            "attention_k_eq_v": True,
            "sliding_window": 7,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        vision_config=_TOWER
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config=None,
        video_token_id=START,
        audio_token_id=END,
        **_IMAGE_ID,
    )
    axes = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    places = torch.stack(axes, dim=-1).reshape(1, 16, 2).repeat(2, 1, 1)
    seen = {"pixel_values": _noise(2, 16, 48).sigmoid(), "image_position_ids": places}
    inputs = _types(_tokens(4), "mm_token_type_ids")
    return hf.Gemma4ForConditionalGeneration(config), inputs | seen


def _grid(name: str, text: dict[str, Any] = _MROPE, frame: Any = None, **tower: Any) -> Case:
    """Qwen2-VL and those after it: patches of all images in one tensor, with their grids."""
    vision = {key: value for key, value in (_GRID | tower).items() if value is not None}
    frame = frame or {"vision_start_token_id": START, "vision_end_token_id": END}
    config = getattr(hf, f"{name}Config")(
        text_config=dict(text), vision_config=vision, video_token_id=OTHER, **frame, **_IMAGE_ID
    )
    inputs = _types(_tokens(4, frame=True), "mm_token_type_ids")
    seen = {"pixel_values": _noise(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return getattr(hf, f"{name}ForConditionalGeneration")(config), inputs | seen


def _qwen2_vl() -> Case:
    unused = {"out_hidden_size": None, "intermediate_size": None}
    return _grid("Qwen2VL", embed_dim=32, hidden_size=48, **unused)


def _qwen3_5() -> Case:
    linear = ["linear_attention", "full_attention", "linear_attention"]
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": linear}
    return _grid("Qwen3_5", _MROPE | sizes | heads, num_position_embeddings=16)


def _glm4v() -> Case:
    frame = {"image_start_token_id": START, "image_end_token_id": END}
    return _grid("Glm4v", frame=frame, image_size=28)


def _tiles(name: str) -> Case:
    """Idefics 3 and SmolVLM: images in tiles, whose patches are merged by fours."""
    config = getattr(hf, f"{name}Config")(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=dict(_TOWER),
        scale_factor=2,
        **_IMAGE_ID,
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    return model, _tokens(4) | {"pixel_values": _noise(2, 1, 3, 28, 28)}


def _merged(name: str, text: str, tower: dict[str, Any], **changes: Any) -> Case:
    """An image of 4 x 4 patches, merged by fours."""
    config = getattr(hf, f"{name}Config")(
        text_config=TEXT | {"model_type": text, "sliding_window": 64},
        vision_config=dict(tower),
        **changes,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config), _tokens(4) | _PIXELS


def _internvl() -> Case:
    tower = _TOWER | {"image_size": [28, 28], "patch_size": [7, 7]}
    return _merged("InternVL", "qwen2", tower, image_seq_length=4, **_IMAGE_ID)


def _mistral3() -> Case:
    model, inputs = _merged("Mistral3", "mistral", _PIXTRAL, spatial_merge_size=2, **_IMAGE_INDEX)
    return model, inputs | {"image_sizes": torch.tensor([[28, 28]] * 2)}


def _lfm2_vl() -> Case:
    kinds = ["conv", "full_attention", "conv"]
    config = hf.Lfm2VlConfig(
        text_config=TEXT
        | {"model_type": "lfm2", "layer_types": kinds, "block_auto_adjust_ff_dim": False},
        vision_config=_TOWER
        | {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16}
        | {"vision_use_head": False},
        downsample_factor=2,
        projector_hidden_size=32,
        **_IMAGE_ID,
    )
    inputs = _tokens(4) | {"pixel_values": _noise(2, 16, 48)}
    inputs["spatial_shapes"] = torch.tensor([[4, 4]] * 2)
    inputs["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.int64)
    return hf.Lfm2VlForConditionalGeneration(config), inputs


def _llama4() -> Case:
    # the text alone: stock's whole model raises in this release, with and without images
    sizes = {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 64}
    config = hf.Llama4TextConfig(**TEXT | sizes, attention_chunk_size=7)
    return hf.Llama4ForCausalLM(config), _tokens(0, text=20)


def _mllama() -> Case:
    config = hf.MllamaConfig(
        text_config={name: value for name, value in TEXT.items() if name != "head_dim"}
        | {"cross_attention_layers": [1], "rope_parameters": dict(_ROPE)},
        vision_config={
            **{name: value for name, value in _TOWER.items() if name != "num_attention_heads"},
            "attention_heads": 4,
            "num_global_layers": 1,
            "max_num_tiles": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        **_IMAGE_INDEX,
    )
    inputs = _tokens(1)
    tile = torch.tensor([1, 0, 0, 0])
    inputs["cross_attention_mask"] = tile.repeat(2, inputs["input_ids"].shape[1], 1, 1)
    inputs["pixel_values"] = _noise(2, 1, 4, 3, 28, 28)
    inputs["aspect_ratio_ids"] = torch.ones(2, 1, dtype=torch.int64)
    inputs["aspect_ratio_mask"] = tile.repeat(2, 1, 1)
    return hf.MllamaForConditionalGeneration(config), inputs


def _got_ocr2() -> Case:
    config = hf.GotOcr2Config(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=_TOWER
        | {"image_size": 64, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1]}
        | {"output_channels": 16, "mlp_dim": 32},
        image_seq_length=16,
        **_IMAGE_ID,
    )
    model = hf.GotOcr2ForConditionalGeneration(config)
    return model, _tokens(16) | {"pixel_values": _noise(2, 3, 64, 64)}


def _blip2() -> Case:
    small = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_attention_heads": 6}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "init_std": 0.2}
    config = hf.Blip2Config(
        text_config={"model_type": "opt", "ffn_dim": 64, "num_hidden_layers": 2, **small, **ids}
        | {"word_embed_proj_dim": 48, "max_position_embeddings": 128},
        qformer_config=_TOWER | {"vocab_size": VOCABULARY, "encoder_hidden_size": 32},
        vision_config=dict(_TOWER),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return hf.Blip2ForConditionalGeneration(config), _tokens(4) | _PIXELS


_CODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}


def _whisper() -> Case:
    config = hf.WhisperConfig(
        **_CODER | _AUDIO, begin_suppress_tokens=None, suppress_tokens=None, max_target_positions=64
    )
    return hf.WhisperForConditionalGeneration(config), {"input_features": _noise(2, 8, 32)}


def _hears(name: str, text: str, audio: dict[str, Any], seen: int, **changes: Any) -> Case:
    config = getattr(hf, f"{name}Config")(
        text_config=TEXT | {"model_type": text}, audio_config=audio | _AUDIO, **changes
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    return model, _tokens(seen) | {"input_features": _noise(2, 8, 32)}


def _qwen2_audio() -> Case:
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 48, "model_type": "qwen2_audio_encoder"}
    model, inputs = _hears("Qwen2Audio", "qwen2", audio, 8, audio_token_index=IMAGE)
    return model, inputs | {"feature_attention_mask": torch.ones(2, 32, dtype=torch.int64)}


def _voxtral() -> Case:
    # four frames of the tower are one token
    audio = _TOWER | {"intermediate_size": 128, "head_dim": 8}
    return _hears("Voxtral", "llama", audio, 4, audio_token_id=IMAGE)


def _bart(name: str) -> Case:
    made = _CODER | {"forced_eos_token_id": None, "max_position_embeddings": 64}
    model = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    return getattr(hf, model)(getattr(hf, f"{name}Config")(**made)), _tokens(0, text=14)


MODELS: dict[str, Callable[[], Case]] = {
    "llava": lambda: _llava("llama", _CLIP),
    "qwen2_5_vl": lambda: _grid("Qwen2_5_VL", window_size=16, fullatt_block_indexes=[1]),
    "gemma4": _gemma4,
    "llama4": _llama4,
    "whisper": _whisper,
    "got_ocr2": _got_ocr2,
    "gemma3": _gemma3,
    "pixtral": _pixtral,
    "llava_next": _llava_next,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": lambda: _grid(
        "Qwen3VL", deepstack_visual_indexes=[0, 1], num_position_embeddings=16
    ),
    "qwen3_5": _qwen3_5,
    "glm4v": _glm4v,
    "idefics3": lambda: _tiles("Idefics3"),
    "smolvlm": lambda: _tiles("SmolVLM"),
    "internvl": _internvl,
    "mistral3": _mistral3,
    "aya_vision": lambda: _merged(
        "AyaVision", "cohere2", _SIGLIP, downsample_factor=2, **_IMAGE_INDEX
    ),
    "lfm2_vl": _lfm2_vl,
    "mllama": _mllama,
    "blip-2": _blip2,
    "qwen2_audio": _qwen2_audio,
    "voxtral": _voxtral,
    "bart": lambda: _bart("Bart"),
    "marian": lambda: _bart("Marian"),
    "m2m_100": lambda: _bart("M2M100"),
    "pegasus": lambda: _bart("Pegasus"),
}
