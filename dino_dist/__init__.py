"""Pretrain DINO vision transformers (arXiv:2104.14294) without labels on many ranks, exactly resumable."""

__version__ = "0.1.0"
