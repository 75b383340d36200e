"""What the fields of a GGUF architecture mean for a config of Transformers."""

from typing import Any, NamedTuple


class Field(NamedTuple):
    """One field: the attributes that it may set, and the values that stand for "none of it".

    The first attribute that a config's class has is set. `harmless`: no computation depends on it,
    or the tensors' own shapes state it once more.
    """

    sets: tuple[str, ...] = ()
    neutral: tuple[Any, ...] = ()
    harmless: bool = False

    def attribute(self, names: set[str]) -> str | None:
        """The attribute that it sets of a class that has `names`."""
        return next((name for name in self.sets if name in names), None)


FIELDS = {
    "attention.causal": Field(neutral=(True,)),
    "attention.clamp_kqv": Field(neutral=(0,)),
    "attention.head_count": Field(neutral=(0,)),
    "attention.head_count_kv": Field(("num_key_value_heads", "num_kv_heads")),
    "attention.layer_norm_epsilon": Field(
        ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
    ),
    "attention.layer_norm_rms_epsilon": Field(("rms_norm_eps", "norm_eps", "layer_norm_epsilon")),
    "attention.max_alibi_bias": Field(neutral=(0,)),
    "attention.output_scale": Field(neutral=(1,)),
    "attention.shared_kv_layers": Field(("num_kv_shared_layers",), (0,)),
    "attention.sliding_window": Field(("sliding_window",), (0,)),
    "attn_logit_softcapping": Field(("attn_logit_softcapping",), (0,)),
    "block_count": Field(harmless=True),
    "context_length": Field(("n_positions", "max_position_embeddings"), harmless=True),
    "embedding_length_per_layer_input": Field(("hidden_size_per_layer_input",), (0,)),
    "embedding_scale": Field(neutral=(1,)),
    "expert_count": Field(neutral=(0,)),
    "expert_feed_forward_length": Field(("moe_intermediate_size",), harmless=True),
    "expert_gating_func": Field(neutral=(0, 1)),
    "expert_group_count": Field(neutral=(0, 1)),
    "expert_group_used_count": Field(neutral=(0, 1)),
    "expert_shared_count": Field(neutral=(0,)),
    "expert_shared_feed_forward_length": Field(("shared_expert_intermediate_size",)),
    "expert_used_count": Field(neutral=(0,)),
    "expert_weights_norm": Field(("norm_topk_prob",), (False,)),
    "expert_weights_scale": Field(neutral=(0, 1)),
    "feed_forward_length": Field(("n_inner", "intermediate_size", "ffn_hidden_size"), (0,)),
    "final_logit_softcapping": Field(("final_logit_softcapping",), (0,)),
    "leading_dense_block_count": Field(neutral=(0,)),
    "logit_scale": Field(neutral=(1,)),
    # their tensors are either passed over by the model's class or refused
    "nextn_predict_layers": Field(harmless=True),
    "pooling_type": Field(neutral=(0,)),
    "residual_scale": Field(neutral=(1,)),
    "router_logit_softcapping": Field(neutral=(0,)),
    "ssm.dt_b_c_rms": Field(neutral=(False,)),
    "tensor_data_layout": Field(harmless=True),
    "use_parallel_residual": Field(("use_parallel_residual",)),
    "vocab_size": Field(harmless=True),
}
