"""Attention modules to build and train models with."""

from headwise.nn.attention import Attention
from headwise.nn.decoder import Decoder
from headwise.nn.latent_attention import LatentAttention
from headwise.nn.linear_attention import LinearAttention
from headwise.nn.memory import Memory
from headwise.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

__all__ = [
    "Attention",
    "Decoder",
    "LatentAttention",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "Memory",
    "Rope",
    "YarnScaling",
]
