"""Caches that outlive the process: saved and loaded, or remembered and recalled."""

from headwise.hf.stored.recall import recall, remember
from headwise.hf.stored.remembered import Remembered
from headwise.hf.stored.save import load_cache, save_cache

__all__ = ["Remembered", "load_cache", "recall", "remember", "save_cache"]
