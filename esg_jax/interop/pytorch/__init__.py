"""PyTorch modules that run what `esg convert` writes; they may be copied into a PyTorch project (`torch` extra)."""
