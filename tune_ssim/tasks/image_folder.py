"""Crops of a folder of images of any size and mode, split into training and held-out images by their contents.

An image belongs to the held-out part if the first 32 bits of its SHA-256, as a fraction of 2^32, lie below `HELD_OUT`. So an image
stays in its part if it is renamed or other images are added, and two copies never land in different parts. If a part would be
empty, one image is moved to it. If there are sub-folders `train` and `held_out`, they are the parts instead, for example to keep
images of one patient together.

Every image is decoded once when a process first sees it, so that a broken one is found before the first step. Afterwards pixels
are read when needed, and cached up to `CACHE_BYTES`.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from tune_ssim.base.errors import UserError
from tune_ssim.tasks.fundus_images import BACKGROUND, MAX_BACKGROUND, flipped

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".jp2")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")  # no format that starts another program, as EPS does
MAX_PIXELS = 89_478_485  # per image: Pillow's own limit against decompression bombs
MAX_BYTES = 2**30  # per file
CACHE_BYTES = 256 * 2**20  # per process; about 80 images of a megapixel
THREADS = 4  # decoder threads; bounds the memory of the first scan
HELD_OUT = 0.3  # as for the bundled photograph
PARTS = ("train", "held_out")
CANDIDATES = 4  # places tried for a crop that is not mostly background
HELD_OUT_SEED = 20_251_122  # seeds the places of held-out crops, the same for every trial
WHITE = {"uint8": 255, "uint16": 65_535, "float32": 1}
NAMED = 20  # files named in a message


class Unreadable(Exception):
    """Why a file cannot be used."""


@dataclass(frozen=True)
class ImageFile:
    """An image file. sha256: of the file. height, width: in pixels, upright, after reduction."""

    path: str
    sha256: str
    height: int
    width: int


@dataclass(frozen=True)
class FolderImages:
    """`train`, `held_out`: in hash order, so that names do not matter. left_out: file → reason. crop: pixels.
    side: images with a longer shorter side were reduced to it."""

    train: tuple[ImageFile, ...]
    held_out: tuple[ImageFile, ...]
    left_out: Mapping[str, str]
    crop: int
    side: int | None = None

    def train_crops(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`[count, 3, crop, crop]` in [0, 1]: an image, then a place in it, drawn uniformly; flipped at random."""
        chosen = torch.randint(len(self.train), (count,), generator=generator)
        crops = torch.stack([self._crop(self.train[i], generator) for i in chosen.tolist()])
        return flipped(crops, generator)

    def held_out_crops(self, count: int) -> torch.Tensor:
        """`[count, 3, crop, crop]`: fixed crops, in equal shares from all held-out images."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return torch.stack([self._crop(self.held_out[i], generator) for i in self.held_out_sources(count)])

    def held_out_sources(self, count: int) -> list[int]:
        """Index of the image that each held-out crop is cut from."""
        return [i * len(self.held_out) // count for i in range(count)]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the contents of each part's files, independent of names and paths."""
        parts = {"data/train": self.train, "data/held_out": self.held_out}
        return {
            name: hashlib.sha256(f"{self.side}".encode() + "".join(file.sha256 for file in files).encode()).hexdigest()
            for name, files in parts.items()
        }

    def _crop(self, file: ImageFile, generator: torch.Generator) -> torch.Tensor:
        """The first of a few places with little background, else the one with the least: fundus photographs have black frames."""
        pixels, candidates = CACHE.pixels(file, self.side), []
        rows = torch.randint(file.height - self.crop + 1, (CANDIDATES,), generator=generator).tolist()
        columns = torch.randint(file.width - self.crop + 1, (CANDIDATES,), generator=generator).tolist()
        for row, column in zip(rows, columns, strict=True):
            crop = _unit(pixels[row : row + self.crop, column : column + self.crop])
            background = (crop.amax(dim=0) < BACKGROUND).float().mean().item()
            if background <= MAX_BACKGROUND:
                return crop
            candidates.append((background, crop))
        return min(candidates, key=lambda item: item[0])[1]


def load_folder_images(folder: str | Path, crop: int, side: int | None = None, errors: str = "skip") -> FolderImages:
    """Images under `folder`, including sub-folders. Hidden files and folders are ignored; links are followed, but not in loops.

    A file that cannot be read, or whose image is smaller than the crop, is left out and named (`skip`), or ends the study
    (`refuse`). Raises UserError for that, and for fewer than two images."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"data: {root}: {'not a folder' if root.exists() else 'no such folder'}")
    given = all((root / part).is_dir() for part in PARTS)
    parts = {part: _files(root / part) for part in PARTS} if given else {"": _files(root)}
    return _looked_at(str(root), tuple(parts.items()), crop, side, errors)


@lru_cache(maxsize=2)  # valid as long as the files are unchanged
def _looked_at(
    root: str, parts: tuple[tuple[str, tuple[Found, ...]], ...], crop: int, side: int | None, errors: str
) -> FolderImages:
    left_out: dict[str, str] = {}
    images: dict[str, list[ImageFile]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for part, found in parts:
            for file, seen in zip(found, pool.map(lambda f: _look(f, side), found), strict=True):
                name = os.path.relpath(file[0], root)
                if isinstance(seen, str):
                    left_out[name] = seen
                elif min(seen.height, seen.width) < crop:
                    left_out[name] = f"{seen.width} x {seen.height} pixels, less than a crop of {crop}"
                else:
                    images.setdefault(part, []).append(seen)
    if left_out and errors == "refuse":
        raise UserError(f"data: {root}: {words(left_out)}; remove them, or say data_errors: skip")
    train, held_out = _split(root, {part: _once(found) for part, found in images.items()}, left_out)
    return FolderImages(train, held_out, left_out, crop, side)


def words(left_out: Mapping[str, str]) -> str:
    named = "; ".join(f"{name} ({why})" for name, why in list(left_out.items())[:NAMED])
    more = f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
    return f"{len(left_out)} {'file' if len(left_out) == 1 else 'files'} cannot be used: {named}{more}"


def _once(images: Sequence[ImageFile]) -> list[ImageFile]:
    """Removes copies of an image."""
    return sorted({image.sha256: image for image in reversed(images)}.values(), key=lambda image: image.sha256)


def _split(
    root: str, images: Mapping[str, list[ImageFile]], left_out: Mapping[str, str]
) -> tuple[tuple[ImageFile, ...], tuple[ImageFile, ...]]:
    why = f": {words(left_out)}" if left_out else ""
    if "" not in images and any(part in images for part in PARTS):
        train, held_out = (images.get(part, []) for part in PARTS)
        for part, files in zip(PARTS, (train, held_out), strict=True):
            if not files:
                raise UserError(f"data: {root}/{part}: no image that can be used{why}")
        twice = {image.sha256: image.path for image in train}
        for image in held_out:
            if image.sha256 in twice:
                raise UserError(f"data: {image.path} is held out, and trained on as {twice[image.sha256]}")
        return tuple(train), tuple(held_out)
    every = images.get("", [])
    if len(every) < 2:
        raise UserError(f"data: {root}: {len(every)} different images that can be used; at least 2, one is held out{why}")
    fractions = [int(image.sha256[:8], 16) / 2**32 for image in every]  # ascending, since the images are in hash order
    first = min(max(sum(fraction < HELD_OUT for fraction in fractions), 1), len(every) - 1)
    return tuple(every[first:]), tuple(every[:first])


# -- files

Found = tuple[str, int, int, str]  # path, size, mtime_ns, and the reason why it cannot be used, if already known


def _files(folder: Path) -> tuple[Found, ...]:
    return tuple(sorted(_walk(folder)))


def _walk(folder: Path) -> Iterator[Found]:
    seen: set[tuple[int, int]] = set()
    problems: list[OSError] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=problems.append):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder already walked, or to a parent
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = f"{place}/{name}"
            try:
                status = Path(path).stat()
            except OSError as error:
                yield path, 0, 0, str(error.strerror or error).lower()
                continue
            why = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
            yield path, status.st_size, status.st_mtime_ns, why or ("larger than 1 GiB" if status.st_size > MAX_BYTES else "")
    for problem in problems:
        yield str(problem.filename), 0, 0, str(problem.strerror).lower()


def _look(found: Found, side: int | None) -> ImageFile | str:
    path, size, mtime_ns, why = found
    return why or _look_inside(path, size, mtime_ns, side)


@lru_cache(maxsize=1_000_000)  # keyed by size and mtime_ns, so a changed file is read again
def _look_inside(path: str, size: int, mtime_ns: int, side: int | None) -> ImageFile | str:
    try:
        content = Path(path).read_bytes()
        height, width = read_pixels(content, side).shape[:2]
    except Unreadable as reason:
        return str(reason)
    except OSError as error:
        return str(error.strerror or error).lower()
    return ImageFile(path, hashlib.sha256(content).hexdigest(), height, width)


# -- pixels


def read_pixels(content: bytes, side: int | None = None) -> np.ndarray:
    """Decodes an image to `[height, width, channels]`: 3 channels of uint8, or 1 of uint16 or float32 (white: `WHITE`), upright
    according to EXIF.

    Uses the first of several frames. Transparent parts become black. 16-bit values are fractions of 65535; floating-point values
    must lie in [0, 1], since white cannot be guessed. Colour profiles are not applied. side: a longer shorter side is reduced to
    this by area averaging. Raises Unreadable."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            image.load()
            return _reduced(_array(ImageOps.exif_transpose(image)), side)
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unreadable("no image that can be read" if content else "empty") from None
    except Exception as error:  # decoders of malformed files raise anything
        raise Unreadable(" ".join(str(error).split())[:100] or type(error).__name__) from None


def _array(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        numbers = np.asarray(image)
        lowest, highest = int(numbers.min()), int(numbers.max())
        if lowest < 0 or highest > WHITE["uint16"]:
            raise Unreadable(f"integers from {lowest} to {highest}; valid: 0 to {WHITE['uint16']}")
        return numbers.astype(np.uint16)[..., None]
    if image.mode == "F":
        numbers = np.asarray(image, dtype=np.float32)
        if not np.isfinite(numbers).all():
            raise Unreadable("holds NaN or infinite numbers")
        if numbers.min() < 0 or numbers.max() > 1:
            raise Unreadable(f"floating-point numbers from {numbers.min():g} to {numbers.max():g}; valid: 0 to 1")
        return numbers[..., None]
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _reduced(pixels: np.ndarray, side: int | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if side is None or shorter <= side:
        return pixels
    size = (max(side, round(width * side / shorter)), max(side, round(height * side / shorter)))
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    reduced = np.asarray(Image.fromarray(pixels[..., 0].astype(np.float32)).resize(size, Image.Resampling.BOX))
    return (reduced.round() if pixels.dtype == np.uint16 else reduced).astype(pixels.dtype)[..., None]


def _unit(pixels: np.ndarray) -> torch.Tensor:
    """`[h, w, 1 or 3]` → `[3, h, w]` float32 in [0, 1]."""
    numbers = torch.from_numpy(pixels.astype(np.float32) / WHITE[pixels.dtype.name])
    return numbers.permute(2, 0, 1).expand(3, -1, -1).contiguous()


class PixelCache:
    """Decoded images in an LRU cache of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[tuple[str, int | None], np.ndarray] = OrderedDict()

    def pixels(self, file: ImageFile, side: int | None) -> np.ndarray:
        """The pixels of a file. Raises UserError if it has changed since the scan."""
        key = (file.sha256, side)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        try:
            content = Path(file.path).read_bytes()
        except OSError as error:
            raise UserError(f"{file.path}: {str(error.strerror or error).lower()}, though it was there before") from None
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise UserError(f"{file.path}: has changed while it was in use")
        pixels = read_pixels(content, side)
        self.kept[key] = pixels
        self.bytes += pixels.nbytes
        while self.bytes > self.limit:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return pixels


CACHE = PixelCache(CACHE_BYTES)
