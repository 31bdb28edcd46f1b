"""ExPO post-training on fused kernels."""
