"""Rows as integers with scales: what a quantised cache holds."""
