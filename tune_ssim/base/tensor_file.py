"""A safetensors file without torch: what it holds, the SHA-256 of its tensors, the ancestry it declares.

Only safetensors is read: numbers behind a JSON header. A pickle can run code, and is refused unread.
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
BLOCK = 1 << 20  # bytes hashed at a time: they are still in the cache of the processor that has just read them

# How files begin that are often given in place of safetensors.
PICKLE = "a pickle can run code and is never read; convert it with safetensors.torch.save_file"
IMPOSTORS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a zip archive, as torch.save writes it with a pickle inside: {PICKLE}"),
    *((bytes([0x80, protocol]), f"a pickle: {PICKLE}") for protocol in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: run `git lfs pull`"),
)


@dataclass(frozen=True)
class Contents:
    """The tensors of a file or of a training's state, as hashes. Plain JSON: `Contents(**asdict(contents))` is equal.

    hashes: name → SHA-256 of each tensor. distinctive: SHA-256 → those of the same numbers at every precision, for the
    tensors by which a training is recognised (`probes.tensor_contents` says which).
    """

    hashes: Mapping[str, str]
    distinctive: Mapping[str, Sequence[str]]

    @property
    def id(self) -> str:
        return content_id(self.hashes)


def content_id(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for all tensors, whatever their names and order, and whether tied weights were stored once or twice."""
    return hashlib.sha256("\n".join(sorted(set(hashes.values()))).encode()).hexdigest()


def tensor_digest(dtype: str, shape: Iterable[int]) -> Any:
    """A SHA-256 to be updated with the tensor's bytes. `dtype` as safetensors spells it: F32, BF16, I64, …"""
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def parents_metadata(parents: Iterable[str]) -> dict[str, str]:
    """For the `metadata` of safetensors: the content ids of everything that the tensors were made from, without doubles."""
    ids = list(dict.fromkeys(parents))
    if wrong := [parent for parent in ids if not _is_content_id(parent)]:
        raise ValueError(f"parents are content ids (64 hexadecimal digits), got {wrong[0]!r}")
    return {PARENTS: json.dumps(ids)} if ids else {}


@dataclass(frozen=True)
class TensorFile:
    """`header`: what safetensors keeps of each tensor: dtype, shape, and data_offsets counted from `data_start`."""

    path: Path
    metadata: Mapping[str, str]
    header: Mapping[str, Mapping[str, Any]]
    data_start: int

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Raises BadSetup, in one line, for anything but a whole safetensors file."""
        from safetensors import safe_open  # of the extra `losses`; the verbs that list and export work without

        path = Path(path)
        try:
            if not path.is_file():  # also before a pipe or a device is opened, which might never end
                kind = "is a directory" if path.is_dir() else "is not a regular file" if path.exists() else "no such file"
                raise BadSetup(f"{path}: {kind}; a safetensors file is needed")
            with safe_open(path, framework="numpy"):
                pass  # the library checks the header: sizes, offsets, no gap, no overlap, nothing after the end
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except OSError as error:
            raise BadSetup(f"{path}: {error.strerror or error}") from None
        except BadSetup:
            raise
        except Exception as error:  # safetensors and json raise their own types for anything malformed
            raise BadSetup(f"{path}: {_what_it_is(path, error)}") from None
        metadata = header.pop("__metadata__", None) or {}
        return cls(path, metadata, header, 8 + size)

    def hashes(self) -> dict[str, str]:
        """name → SHA-256 of dtype, shape and bytes. Raises BadSetup if the file goes or shrinks meanwhile."""
        found, buffer = {}, memoryview(bytearray(BLOCK))
        # Read, not mapped into memory: of a mapped file that shrinks, the process would die.
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

    def parents(self) -> tuple[str, ...]:
        """The declared ancestry; empty if none is declared. Raises BadSetup if it cannot be read."""
        text = self.metadata.get(PARENTS, "[]")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(map(_is_content_id, found)):
            raise BadSetup(f"{self.path}: metadata {PARENTS!r} is not a JSON list of content ids: {text[:80]!r}")
        return tuple(found)

    def ancestry(self) -> tuple[str, ...]:
        """What a training that starts from this file declares as its parents: the file, and what the file declares."""
        return (content_id(self.hashes()), *self.parents())


def _is_content_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _what_it_is(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty; a safetensors file is needed"
    # Asked only now: the first bytes of safetensors are a length, and may be those of a pickle by chance.
    for beginning, words in IMPOSTORS:
        if start.startswith(beginning):
            return f"not a safetensors file but {words}"
    return f"not a whole safetensors file ({' '.join(str(error).split())})"
