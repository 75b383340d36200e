"""Exact search: the keys with the largest scores for each query and head."""
