"""The short causal convolution that stands before linear attention."""
