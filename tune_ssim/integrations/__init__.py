"""Ready callbacks for trainers that keep the loop to themselves: `lightning`, `huggingface` (and accelerate).

Each module needs its library: `pip install 'tune-ssim[lightning]'`, `'tune-ssim[transformers]'`.
"""
