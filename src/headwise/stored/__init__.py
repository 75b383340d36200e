"""Caches in files: rows in pages that are mapped, what they are of, and a folder of them."""
