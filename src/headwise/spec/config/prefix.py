"""Gemma's attention to both sides: of a prompt before causal text, or of a text to embed."""

from headwise.spec.config.fields import ConfigFields

# How the names of classes end that decode.
_DECODES = ("ForCausalLM", "ForConditionalGeneration")


def bidirectional(fields: ConfigFields) -> bool:
    """Whether tokens see those after them; says nothing about what is cached.

    >>> bidirectional(ConfigFields({"use_bidirectional_attention": True}))
    True
    """
    return fields.optional_flag("use_bidirectional_attention")


def has_prefix(fields: ConfigFields) -> bool:
    """Whether that holds for a prompt only, so that keys and values are cached all the same.

    Transformers' models with this flag make a cache and fill it, as PaliGemma does. A config that
    names its class, and none that decodes, is that of an encoder: EmbeddingGemma's.

    >>> flag = {"use_bidirectional_attention": True}
    >>> has_prefix(ConfigFields({**flag, "architectures": ["Gemma3TextModel"]}))
    False
    >>> has_prefix(ConfigFields({**flag, "architectures": ["Gemma3ForCausalLM"]}))
    True
    """
    if not bidirectional(fields):
        return False
    names = fields.raw("architectures")
    if not isinstance(names, list | tuple) or not names:
        return True
    return any(str(name).endswith(_DECODES) for name in names)
