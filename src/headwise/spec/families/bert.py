"""BERT and RoBERTa: encoders, or decoders when is_decoder says so."""

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.heads import equal_heads, split_hidden
from headwise.spec.config.layout import Layout, one_stack

_DEFAULTS: dict[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "is_decoder": False,
    "add_cross_attention": False,
}


def _read_bert(fields: ConfigFields) -> Layout:
    return _read(fields, max_context=fields.positive("max_position_embeddings"))


def _read_roberta(fields: ConfigFields) -> Layout:
    # RoBERTa numbers its positions from pad_token_id + 1, so the table has fewer usable rows.
    rows, pad = fields.positive("max_position_embeddings"), fields.raw("pad_token_id")
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise SpecError(
            f"pad_token_id={shown(pad)}: expected an integer from 0 that leaves positions free in "
            f"max_position_embeddings={rows}"
        )
    return _read(fields, max_context=rows - pad - 1)


def _read(fields: ConfigFields, max_context: int) -> Layout:
    heads, head_dim = fields.positive("num_attention_heads"), split_hidden(fields)
    layers, causal = fields.layers("num_hidden_layers"), fields.flag("is_decoder")

    cross = None
    if fields.flag("add_cross_attention"):
        if not causal:
            raise SpecError(
                "add_cross_attention=True with is_decoder=False: "
                "expected a decoder; set is_decoder=True"
            )
        cross = [equal_heads(heads, head_dim, causal=False, cross=True)] * layers
    attention = equal_heads(heads, head_dim, causal=causal)
    return one_stack([attention] * layers, max_context, cross)


BERT = Family(model_type="bert", read=_read_bert, defaults=_DEFAULTS)
ROBERTA = Family(model_type="roberta", read=_read_roberta, defaults=_DEFAULTS | {"pad_token_id": 1})
