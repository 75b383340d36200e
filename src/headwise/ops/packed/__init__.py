"""Weights in the blocks of GGUF files: what their formats are, and how they are made and read."""
