"""ExPO post-training on fused kernels."""

__version__ = "0.1.0"
