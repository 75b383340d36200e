"""From a Hugging Face config to layers: a small file per kind of family, a table of them all."""

from collections.abc import Mapping

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.readers.bert import BERT, ROBERTA
from headwise.spec.readers.bloom import BLOOM
from headwise.spec.readers.deepseek import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_MHA,
    DEEPSEEK_V3,
    DEEPSEEK_V3_MHA,
    DEEPSEEK_V32,
    GLM4_MOE_LITE,
    MINICPM3,
)
from headwise.spec.readers.falcon import FALCON
from headwise.spec.readers.family import Family
from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.gemma import GEMMA2, GEMMA3_TEXT, GEMMA3N_TEXT
from headwise.spec.readers.gpt2 import GPT2, GPT_BIGCODE
from headwise.spec.readers.gpt_oss import GPT_OSS
from headwise.spec.readers.headwise_mla import HEADWISE_MLA
from headwise.spec.readers.layout import Layout
from headwise.spec.readers.llama import (
    GEMMA,
    GLM,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
)
from headwise.spec.readers.palm import PALM
from headwise.spec.readers.qwen3_next import QWEN3_5, QWEN3_NEXT
from headwise.spec.readers.t5 import T5

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "t5": T5,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "falcon": FALCON,
    "bloom": BLOOM,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "phi3": PHI3,
    "glm": GLM,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_5,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3n_text": GEMMA3N_TEXT,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V32,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "minicpm3": MINICPM3,
    "palm": PALM,
    "headwise_mla": HEADWISE_MLA,
    "headwise_deepseek_v2_mha": DEEPSEEK_V2_MHA,
    "headwise_deepseek_v3_mha": DEEPSEEK_V3_MHA,
}
# Multimodal types whose config class fills in a text part that config.json may leave out.
_DEFAULT_TEXT_TYPE = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "qwen3_5": "qwen3_5_text",
}
# Multimodal types whose config class sets this flag in a text part that leaves it out.
_PREFIX_TYPES = frozenset({"paligemma"})
_PREFIX_FLAG = "use_bidirectional_attention"


def read_config(config: object) -> tuple[str, Layout]:
    """Read `config` as the family that its model_type names, and return both.

    >>> family, layout = read_config({"model_type": "gpt2"})
    >>> family, len(layout.layers), layout.max_context
    ('gpt2', 12, 1024)

    Raises:
        SpecError: naming the field, for an unknown model_type or an inconsistent config.
    """
    outer = ConfigFields(config)
    model_type = outer.model_type()
    text = outer.raw("text_config")
    default_text_type = _DEFAULT_TEXT_TYPE.get(model_type)
    instead: dict[str, object] = {}
    if text is not None or default_text_type is not None:
        config = {} if text is None else text
        inner = ConfigFields(config)
        # The class that runs is the outer one.
        instead["architectures"] = outer.raw("architectures")
        if model_type in _PREFIX_TYPES and inner.raw(_PREFIX_FLAG) is None:
            instead[_PREFIX_FLAG] = True
        model_type = inner.model_type(default=default_text_type)
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join([*FAMILIES, *_DEFAULT_TEXT_TYPE])
        raise SpecError(f"model_type={shown(model_type)} is not covered: expected one of {known}")
    fields = ConfigFields(config, defaults=family.defaults, aliases=family.aliases, instead=instead)
    if fields.raw("per_layer_config"):
        raise SpecError(
            "per_layer_config overrides fields of single layers, which is not covered: "
            f"expected a {model_type} config whose fields hold for every layer"
        )
    if fields.raw("is_causal") is False:
        raise SpecError(
            f"is_causal=False turns {model_type}'s causal masks off, which is not covered: "
            "expected the family's own masks; leave it out"
        )
    return model_type, family.read(fields)
