"""Models from a local folder, a .gguf file or the hub: found, checked, converted once, loaded."""

from headwise.loading.load import load

__all__ = ["load"]
