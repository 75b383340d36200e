"""Softmax attention over keys and values: the call, its definition, and PyTorch's ways to it."""
