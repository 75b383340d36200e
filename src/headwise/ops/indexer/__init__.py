"""Indexers of sparse attention: which keys each query attends to."""
