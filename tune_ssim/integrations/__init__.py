"""Callbacks for trainers that own the training loop: `lightning`, `huggingface`; and `accelerate` for your own loop.

Each module needs its library: `pip install 'tune-ssim[lightning]'`, `'tune-ssim[transformers]'`.
"""
