"""The language side: CLIP, LLaMA, LLaVA, low-rank adapters, int8 kernels."""
