"""Slow, plain reference implementations that the fast ones are tested against. NumPy only, float64 throughout."""

from __future__ import annotations

import numpy as np


def gaussian_window(window_size: int = 11, sigma: float = 1.5) -> np.ndarray:
    offsets = np.arange(window_size) - window_size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    window = np.outer(weights, weights)
    return window / window.sum()


def ssim_reference(
    x: np.ndarray,
    y: np.ndarray,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> float:
    """Mean SSIM of one `[channel, height, width]` pair, window by window, from the two-pass definition of variance."""
    window = gaussian_window(window_size, sigma)
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    x, y = x.astype(np.float64), y.astype(np.float64)
    channels, height, width = x.shape
    values = []
    for c in range(channels):
        for i in range(height - window_size + 1):
            for j in range(width - window_size + 1):
                a = x[c, i : i + window_size, j : j + window_size]
                b = y[c, i : i + window_size, j : j + window_size]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return float(np.mean(values))
