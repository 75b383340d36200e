"""The keys that weigh most for a query, found by a sketch of them."""
