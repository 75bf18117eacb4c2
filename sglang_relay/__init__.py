"""Reuse the KV cache of decoded text at new prompt positions, on stock SGLang."""

__version__ = "0.7.0"
