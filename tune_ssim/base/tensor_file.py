"""Reads safetensors files without torch: their header, the SHA-256 of each tensor, and their declared ancestry.

Only safetensors files are read. A pickle can run code, so it is rejected without being read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import BadSetup

PARENTS = "tune_ssim_parents"  # metadata: JSON list of content ids, the whole ancestry
NARROWER = {"F64": ("F32", "F16", "BF16"), "F32": ("F16", "BF16")}  # lower precisions of a tensor that has no more digits
BLOCK = 1 << 20  # bytes hashed at a time; small enough to stay in the CPU cache

# First bytes of files that are often given in place of safetensors, and what such a file is.
PICKLE = "a pickle can run code and is never read; convert it with safetensors.torch.save_file"
WRONG_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a zip archive, as torch.save writes it with a pickle inside: {PICKLE}"),
    *((bytes([0x80, protocol]), f"a pickle: {PICKLE}") for protocol in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: run `git lfs pull`"),
)


@dataclass(frozen=True)
class Contents:
    """Hashes of the tensors in a file or in a training state. JSON-serialisable: `Contents(**asdict(contents))` is equal.

    hashes: name → SHA-256 of each tensor. distinctive: SHA-256 → hashes of the same tensor at every precision. It has only
    the tensors that identify a training (defined in `probes.tensor_contents`).
    """

    hashes: Mapping[str, str]
    distinctive: Mapping[str, Sequence[str]]

    @property
    def id(self) -> str:
        return content_id(self.hashes)


def content_id(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a set of tensors. Independent of names, order, and whether tied weights are stored once or twice."""
    return hashlib.sha256("\n".join(sorted(set(hashes.values()))).encode()).hexdigest()


def tensor_digest(dtype: str, shape: Iterable[int]) -> Any:
    """A SHA-256 object to update with the tensor's bytes. `dtype` as in safetensors: F32, BF16, I64, …"""
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def parents_metadata(parents: Iterable[str]) -> dict[str, str]:
    """The safetensors `metadata` that declares `parents`: content ids of everything the tensors were made from.

    Duplicates are removed. Raises ValueError for anything that is not a content id."""
    ids = list(dict.fromkeys(parents))
    if wrong := [parent for parent in ids if not _is_content_id(parent)]:
        raise ValueError(f"parents are content ids (64 hexadecimal digits), got {wrong[0]!r}")
    return {PARENTS: json.dumps(ids)} if ids else {}


@dataclass(frozen=True)
class TensorFile:
    """An opened safetensors file. `header`: dtype, shape and data_offsets of each tensor; offsets count from `data_start`."""

    path: Path
    metadata: Mapping[str, str]
    header: Mapping[str, Mapping[str, Any]]
    data_start: int

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Reads the header. Raises a one-line BadSetup for anything but a complete safetensors file."""
        from safetensors import safe_open  # from the extra `losses`; listing and exporting work without it

        path = Path(path)
        try:
            if not path.is_file():  # checked first, because reading a pipe or a device may never end
                kind = "is a directory" if path.is_dir() else "is not a regular file" if path.exists() else "no such file"
                raise BadSetup(f"{path}: {kind}; a safetensors file is needed")
            with safe_open(path, framework="numpy"):
                pass  # safe_open validates the header: sizes and offsets, with no gaps, overlaps or trailing bytes
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except OSError as error:
            raise BadSetup(f"{path}: {error.strerror or error}") from None
        except BadSetup:
            raise
        except Exception as error:  # safetensors and json raise their own types for malformed files
            raise BadSetup(f"{path}: {_what_it_is(path, error)}") from None
        metadata = header.pop("__metadata__", None) or {}
        return cls(path, metadata, header, 8 + size)

    def hashes(self) -> dict[str, str]:
        """name → SHA-256 of dtype, shape and bytes. Raises BadSetup if the file is deleted or truncated while it is read."""
        found, buffer = {}, memoryview(bytearray(BLOCK))
        # Not memory-mapped: if a mapped file is truncated, the process dies with SIGBUS.
        try:
            with self.path.open("rb", buffering=0) as file:
                for name, tensor in sorted(self.header.items(), key=lambda item: item[1]["data_offsets"]):
                    start, end = tensor["data_offsets"]
                    digest, left = tensor_digest(tensor["dtype"], tensor["shape"]), end - start
                    file.seek(self.data_start + start)
                    while left:
                        count = file.readinto(buffer[: min(left, BLOCK)])
                        if not count:
                            raise BadSetup(f"{self.path}: ends in the middle of tensor {name!r}")
                        digest.update(buffer[:count])
                        left -= count
                    found[name] = digest.hexdigest()
        except OSError as error:
            raise BadSetup(f"{self.path}: {error.strerror or error}") from None
        return found

    def narrowed(self) -> dict[str, str]:
        """SHA-256 of each tensor at a lower precision that holds all its values → its name, as of a bfloat16 file that was saved
        again in float32. A tensor that needs its precision is given up at its first block."""
        casts = ((name, tensor, lower) for name, tensor in self.header.items() for lower in NARROWER.get(tensor["dtype"], ()))
        return {digest: name for name, tensor, lower in casts if (digest := self._narrowed(tensor, lower)) is not None}

    def _narrowed(self, tensor: Mapping[str, Any], lower: str) -> str | None:
        """The SHA-256 of a tensor cast to `lower`; None if that changes a value."""
        import numpy as np

        start, end = tensor["data_offsets"]
        wide = np.float64 if tensor["dtype"] == "F64" else np.float32
        digest = tensor_digest(lower, tensor["shape"])
        try:
            with self.path.open("rb") as file, np.errstate(over="ignore", invalid="ignore"):
                file.seek(self.data_start + start)
                for left in range(end - start, 0, -BLOCK):
                    block = np.frombuffer(file.read(min(left, BLOCK)), wide)
                    cast = block.astype(np.float16 if lower == "F16" else np.float32)
                    bits = cast.view(np.uint16 if lower == "F16" else np.uint32)
                    if not np.array_equal(cast.astype(wide), block, equal_nan=True):
                        return None
                    if lower == "BF16":  # the upper half of a float32
                        if (bits & 0xFFFF).any():
                            return None
                        bits = (bits >> 16).astype(np.uint16)
                    digest.update(bits.tobytes())
        except (OSError, ValueError) as error:
            raise BadSetup(f"{self.path}: {error}") from None
        return str(digest.hexdigest())

    def parents(self) -> tuple[str, ...]:
        """The declared ancestry; empty if the file declares none. Raises BadSetup if the metadata is malformed."""
        text = self.metadata.get(PARENTS, "[]")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(map(_is_content_id, found)):
            raise BadSetup(f"{self.path}: metadata {PARENTS!r} is not a JSON list of content ids: {text[:80]!r}")
        return tuple(found)

    def ancestry(self) -> tuple[str, ...]:
        """The parents that a training from this file must declare: the file itself and the file's own parents."""
        return (content_id(self.hashes()), *self.parents())


def _is_content_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _what_it_is(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty; a safetensors file is needed"
    # Checked only after parsing failed: a valid safetensors file starts with a length, which may look like a pickle by chance.
    for magic, description in WRONG_FORMATS:
        if start.startswith(magic):
            return f"not a safetensors file but {description}"
    return f"not a whole safetensors file ({' '.join(str(error).split())})"
