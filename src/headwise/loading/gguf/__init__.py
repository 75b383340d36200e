"""GGUF files: read, checked against what Transformers makes of them, converted once and kept."""
