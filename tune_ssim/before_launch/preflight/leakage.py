"""Held-out images among the training images: exact copies by hashed patches, altered ones by normalised patches.

An altered copy (darker, another gamma, noise, JPEG, half a pixel aside) keeps its structure. Patches of band-passed images with
zero mean and unit norm find the most similar place. The images must then agree around the patch too, at the same offset: places
that look alike by chance, such as two edges, do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PATCH = 8  # pixels; side of the squares compared, at half resolution if they are searched for altered copies
STRIDE = 4  # stride of the patches of training images; that of held-out images is 1
MAX_HELD_OUT_SIDE = 64  # pixels; larger held-out images are cropped to the centre
MIN_TEXTURE = 2.0  # standard deviation of a patch in grey levels of 255; flat patches always match
PATCHES = 4  # patches of a held-out image that are searched for, the most textured ones
MARGIN = 2  # pixels; by which a match at half resolution may be moved at full resolution
FINE_SIGMA, COARSE_SIGMA = 0.7, 3.0  # pixels; details between these are compared
INDEPENDENT = 10.0  # pixels of a band-passed image that count as one independent value
MIN_SIMILARITY = 0.7  # correlation of two patches, below which nothing is verified
MIN_AROUND = 150  # pixels around the patch that two images must share
FAINT = 2 / 255  # contrast that is not raised
PIXELS = 2_000_000  # training pixels searched: 870 crops of 48 x 48
CHUNK = 64  # training images at a time


def shared_patches(training: Tensor, held_out: Tensor) -> tuple[list[int], list[int]]:
    """For each training image: how many of its textured patches the held-out images contain, in any of the eight orientations,
    and how many it has. Both `[n, c, H, W]` in [0, 1], compared in 255 grey levels."""
    if min(*training.shape[-2:], *held_out.shape[-2:]) < PATCH:
        return [0] * len(training), [0] * len(training)
    top, left = ((size - min(size, MAX_HELD_OUT_SIDE)) // 2 for size in held_out.shape[-2:])
    held_out = held_out[..., top : top + MAX_HELD_OUT_SIDE, left : left + MAX_HELD_OUT_SIDE]
    known = []
    for turned in (held_out, held_out.transpose(-1, -2)):
        for images in (turned, turned.flip(-1), turned.flip(-2), turned.flip(-1, -2)):
            hashes, textured = _patch_hashes(images, 1)
            known.append(hashes[textured].unique())
    hashes, textured = _patch_hashes(training, STRIDE)
    shared = torch.isin(hashes, torch.cat(known)) & textured
    return shared.sum(dim=1).tolist(), textured.sum(dim=1).tolist()


def _patch_hashes(images: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """For every `PATCH` x `PATCH` square at multiples of `stride`: its hash, `[n, squares]` int64, and whether it has texture."""
    levels = (images * 255).round().clamp(0, 255)
    generator = torch.Generator().manual_seed(255)
    # Small integers, so that every sum is exact in float32: 255 · 64 · 8 · 8 · 3 < 2^24.
    kernels = torch.randint(-64, 65, (4, levels.shape[1], PATCH, PATCH), generator=generator).float()
    hashes, textured = [], []
    for chunk in levels.split(128):  # bounds the working memory
        sums = functional.conv2d(chunk, kernels, stride=stride).long()
        hashes.append(((sums[:, 0] * 1_000_003 + sums[:, 1]) * 1_000_003 + sums[:, 2]) * 1_000_003 + sums[:, 3])
        grey = chunk.mean(1, keepdim=True)
        mean, power = functional.avg_pool2d(grey, PATCH, stride), functional.avg_pool2d(grey * grey, PATCH, stride)
        textured.append((power - mean * mean)[:, 0] >= MIN_TEXTURE**2)
    return torch.cat(hashes).flatten(1), torch.cat(textured).flatten(1)


@dataclass(frozen=True)
class Match:
    """The best match of a held-out image. score: standard errors by which the surroundings of the patch agree."""

    held_out: int
    training: int
    similarity: float
    score: float


def altered_copies(training: Tensor, held_out: Tensor) -> list[Match]:
    """`[n, c, H, W]` and `[m, c, H, W]` in [0, 1] → the best match of each held-out image that has one."""
    if min(*training.shape[-2:], *held_out.shape[-2:]) < 2 * PATCH:
        return []
    best: dict[int, Match] = {}
    for match in _matches(training[: max(1, PIXELS // training[0, 0].numel())], held_out):
        if match.held_out not in best or match.score > best[match.held_out].score:
            best[match.held_out] = match
    return list(best.values())


def _matches(training: Tensor, held_out: Tensor) -> list[Match]:
    bands = [_band(images) for images in (training, held_out)]
    small, few = (functional.avg_pool2d(band, 2) for band in bands)
    known, asked = (_even(band) for band in bands)
    patches, places = _patches(few, PATCH // 2)
    energy = patches.norm(dim=-1)
    chosen = energy.topk(min(PATCHES, energy.shape[1]), dim=1).indices
    queries = functional.normalize(
        torch.gather(patches, 1, chosen[..., None].expand(-1, -1, patches.shape[-1])).flatten(0, 1), dim=1
    )
    least = 0.25 * energy.median()
    similarity, where = torch.full((len(queries),), -1.0), torch.zeros(len(queries), dtype=torch.long)
    width = small.shape[-1] - PATCH + 1
    per_image = (small.shape[-2] - PATCH + 1) * width
    for start in range(0, len(small), CHUNK):
        candidates, _ = _patches(small[start : start + CHUNK], 1)
        size = candidates.norm(dim=-1, keepdim=True)
        unit = torch.where(size > least, candidates / size.clamp(min=1e-9), torch.zeros(()))
        best, at = (unit.flatten(0, 1) @ queries.T).max(dim=0)
        where = torch.where(best > similarity, at + start * per_image, where)
        similarity = torch.maximum(similarity, best)
    found = []
    for query, (alike, at) in enumerate(zip(similarity.tolist(), where.tolist(), strict=True)):
        if alike < MIN_SIMILARITY:
            continue
        image, patch = query // chosen.shape[1], int(chosen[query // chosen.shape[1], query % chosen.shape[1]])
        other, place = at // per_image, at % per_image
        mine, theirs = places[patch], (place // width, place % width)
        score = _agreement(asked[image, 0], known[other, 0], (2 * mine[0], 2 * mine[1]), (2 * theirs[0], 2 * theirs[1]))
        found.append(Match(image, other, alike, score))
    return found


def _agreement(x: Tensor, y: Tensor, at: tuple[int, int], other: tuple[int, int]) -> float:
    """Standard errors by which two images agree around a patch, at `at` in `x` and at `other` in `y`."""
    best = 0.0
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[at[0] : at[0] + 2 * PATCH, at[1] : at[1] + 2 * PATCH] = False
    for down in range(-MARGIN, MARGIN + 1):
        for right in range(-MARGIN, MARGIN + 1):
            (a, b, inside) = _overlap(x, y, mask, other[0] - at[0] + down, other[1] - at[1] + right)
            a, b = a[inside], b[inside]
            if len(a) < MIN_AROUND:
                continue
            a, b = a - a.mean(), b - b.mean()
            correlation = ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)).item()
            degrees = max(min(len(a), _contrasting(a), _contrasting(b)) / INDEPENDENT - 3, 0.0)
            best = max(best, math.atanh(min(correlation, 0.9999)) * math.sqrt(degrees))
    return best


def _contrasting(values: Tensor) -> float:
    """How many normally distributed values have the kurtosis of `values`, which is 3: all of a texture, few of an edge on a flat
    ground, where all but the edge says nothing."""
    squares = values.square()
    return 3 * (squares.sum().square() / squares.square().sum().clamp(min=1e-12)).item()


def _overlap(x: Tensor, y: Tensor, mask: Tensor, down: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of `x`, `y` and `mask`, which belongs to `x`, that lie on each other if `x[0, 0]` lies on `y[down, right]`."""
    top, left = max(0, -down), max(0, -right)
    bottom, end = min(x.shape[0], y.shape[0] - down), min(x.shape[1], y.shape[1] - right)
    here = (slice(top, max(bottom, top)), slice(left, max(end, left)))
    there = (slice(top + down, max(bottom, top) + down), slice(left + right, max(end, left) + right))
    return x[here], y[there], mask[here]


def _patches(images: Tensor, stride: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Patches without their mean, `[n, places, PATCH²]`, and the place of each."""
    found = functional.unfold(images, PATCH, stride=stride).transpose(1, 2)
    rows, columns = ((size - PATCH) // stride + 1 for size in images.shape[-2:])
    places = [(stride * row, stride * column) for row in range(rows) for column in range(columns)]
    return found - found.mean(dim=-1, keepdim=True), places


def _band(images: Tensor) -> Tensor:
    """`[n, 1, H, W]`: grey images, without what is finer or coarser than the sigmas."""
    grey = images.mean(dim=1, keepdim=True)
    return _blurred(grey, FINE_SIGMA) - _blurred(grey, COARSE_SIGMA)


def _even(band: Tensor) -> Tensor:
    """With the same contrast everywhere, so that one long edge does not outweigh the rest."""
    return band / (_blurred(band.square(), COARSE_SIGMA).clamp(min=0).sqrt() + FAINT)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = functional.pad(images, (reach,) * 4, "reflect")
    return functional.conv2d(functional.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
