"""Hashes of weights in memory, and comparison of a module with its weights file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tune_ssim.base.errors import BadSetup
from tune_ssim.base.tensor_file import Contents, TensorFile, content_id, tensor_digest

__all__ = [
    "WeightComparison", "compare_with_file", "content_id", "file_contents", "narrowed_tensors", "tensor_contents", "tensor_hashes",
    "untrained_norms",
]  # fmt: skip

SAFETENSORS, TORCH_SAVE = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")  # file name extensions of checkpoints
# Names as in safetensors, so that a tensor in memory and the same tensor in a file have the same hash.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip

# Number of distinct values that makes a tensor distinctive, by bytes per element. Measured on ruined (gain 300 to 3000) and
# healthy (0, 0.1, 16) trainings of the bundled task after 1 to 25 steps of SGD and AdamW, lr 2.5e-6 to 5e-3, same start and noise.
# In float32 only AdamW's step counters (1 value) were equal in two trainings. Rounded to 16 bits, which hides small updates,
# tensors with up to 171 distinct values were equal (a bias of 192 elements at lr 2.5e-6); the next had 933 values and never was.
MIN_DISTINCT = {8: 16, 4: 16, 2: 512}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # to count bit patterns, because NaN equals nothing
SAMPLE = 1 << 16  # evenly spaced elements in which distinct values are counted; avoids sorting a billion elements
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # precisions in which weights are commonly saved


def tensor_hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name → SHA-256 of dtype, shape and bytes. Independent of device and memory layout; distinguishes NaN payloads and −0.

    Raises TypeError for a tensor without plain memory (sparse, quantised, meta)."""
    return {name: _hash(_plain(name, tensor)) for name, tensor in tensors.items()}


def tensor_contents(tensors: Mapping[str, torch.Tensor]) -> Contents:
    """Hashes of all tensors. For distinctive tensors also the hashes of their casts to float32, float16 and bfloat16, because a
    checkpoint that is saved again in half precision is still the same checkpoint.

    A floating-point tensor is distinctive if it has enough distinct values (MIN_DISTINCT), or if a value is not finite. Unlike
    counters, masks, zeros and ones, no healthy training has it by chance. A cast that is not distinctive is left out.
    """
    return _contents(tensors.items())


def _contents(tensors: Iterable[tuple[str, torch.Tensor]]) -> Contents:
    hashes: dict[str, str] = {}
    distinctive: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors:
        plain = _plain(name, tensor)
        hashes[name] = _hash(plain)
        if _is_distinctive(plain):
            casts = (plain.to(dtype) for dtype in PRECISIONS if dtype != plain.dtype)
            distinctive[hashes[name]] = (hashes[name], *(_hash(cast) for cast in casts if _is_distinctive(cast, plain)))
    return Contents(hashes, distinctive)


def narrowed_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a lower precision holds without loss, in that precision. `from_pretrained(bfloat16).float()` leaves such."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        lower = (dtype for dtype in PRECISIONS if tensor.is_floating_point() and dtype.itemsize < tensor.element_size())
        for cast in map(tensor.to, lower):
            if torch.equal(cast.to(tensor.dtype), tensor):
                found[f"{name} in {cast.dtype}"] = cast
    return found


def file_contents(path: Path) -> Contents | None:
    """`tensor_contents` of a checkpoint by another program: a safetensors or torch.save file, or a folder of them.

    torch.save files are read with `weights_only`, so no code in them runs. None if no tensor can be read."""
    hashes: dict[str, str] = {}
    distinctive: dict[str, Sequence[str]] = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in (SAFETENSORS, *TORCH_SAVE):
            try:
                found = _contents(_tensors_in(file))
            except Exception:  # torch and safetensors raise their own types for malformed files
                continue
            hashes |= {f"{file.name}:{name}": value for name, value in found.hashes.items()}
            distinctive |= found.distinctive
    return Contents(hashes, distinctive) if hashes else None


def _tensors_in(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a file, of a safetensors file one at a time."""
    if file.suffix == SAFETENSORS:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield from ((name, stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118  (not a mapping)
    else:
        yield from _nested(torch.load(file, map_location="cpu", weights_only=True, mmap=True), "")


def _nested(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and not value.is_quantized:
            yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _nested(item, f"{name}/{key}")


@dataclass(frozen=True)
class WeightComparison:
    """Comparison of a module with the safetensors file that it should have been loaded from.

    missing: in the module, not in the file. unexpected: in the file, not in the module. mismatched: name → the two shapes and
    dtypes. different: same shape, other values; a cast to the module's precision does not count. equal_fraction: fraction of
    the module's elements that are bitwise equal to the file. metadata_missing: the file has no `format` in its metadata, which
    some loaders require. norm_parameters: number of parameters in normalisation layers. untrained: see `untrained_norms`.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    different: tuple[str, ...]
    equal_fraction: float
    metadata_missing: bool
    norm_parameters: int
    untrained: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the module has exactly the tensors of the file."""
        return not (self.missing or self.unexpected or self.mismatched or self.different)

    @property
    def fresh(self) -> bool | None:
        """True: no normalisation layer has been trained. False: at least one has. None: the module has none."""
        return len(self.untrained) == self.norm_parameters if self.norm_parameters else None


def compare_with_file(module: torch.nn.Module, path: str | Path) -> WeightComparison:
    """Compares a module with a safetensors file. Executes no code from the file.

    Raises a one-line BadSetup for anything but a safetensors file with tensors in it."""
    stored = TensorFile.open(path)
    if not stored.header:
        raise BadSetup(f"{path}: holds no tensors")
    mine = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    places = {_memory(tensor) for name, tensor in mine.items() if name in stored.header and tensor.numel()}
    missing = [
        name for name in mine if name not in stored.header and _memory(mine[name]) not in places
    ]  # tied weights are stored once
    mismatched: dict[str, str] = {}
    different: list[str] = []
    equal = total = 0
    with safe_open(path, framework="pt", device="cpu") as file:
        for name, tensor in mine.items():
            if name not in stored.header:
                total += tensor.numel() if name in missing else 0
                continue
            total += tensor.numel()
            theirs, plain = file.get_tensor(name), _plain(name, tensor)
            if plain.shape != theirs.shape or _kind(plain) != _kind(theirs):
                mismatched[name] = f"{_describe(plain)} in the module, {_describe(theirs)} in the file"
                continue
            one, other = _bits(plain), _bits(theirs.to(plain.dtype).contiguous())
            same = plain.numel() if torch.equal(one, other) else int((one == other).all(dim=-1).sum())
            equal += same
            if same < plain.numel():
                different.append(name)
    norms = _norm_parameters(module)
    return WeightComparison(
        missing=tuple(missing),
        unexpected=tuple(sorted(stored.header.keys() - mine.keys())),
        mismatched=mismatched,
        different=tuple(different),
        equal_fraction=equal / total if total else 0.0,
        metadata_missing="format" not in stored.metadata,
        norm_parameters=len(norms),
        untrained=untrained_norms(module),
    )


def untrained_norms(module: torch.nn.Module) -> tuple[str, ...]:
    """Parameters of normalisation layers that are all 0 or all 1, their initial values; the first optimiser step changes them.

    Only normalisation layers reveal this: other layers start from random values, which can look like trained ones. A network
    whose norms were always frozen looks untrained, so this complements a file hash but does not replace it.
    """
    return tuple(name for name, value in _norm_parameters(module).items() if bool((value == 0).all() or (value == 1).all()))


def _norm_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of layers with "norm" in their class name, because LlamaRMSNorm and others do not derive from torch's classes.

    Parameters with one element are excluded."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter.detach()
        for prefix, layer in module.named_modules()
        if "norm" in type(layer).__name__.lower()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.numel() > 1
    }


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, without lazy conjugation. Used one tensor at a time to save memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{name}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} has no bytes to hash")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _bits(plain: torch.Tensor) -> torch.Tensor:
    """A view of the bytes, `[elements, bytes]`."""
    return plain.flatten().view(torch.uint8).reshape(plain.numel(), plain.element_size())


def _hash(plain: torch.Tensor) -> str:
    digest = tensor_digest(DTYPE_NAMES.get(plain.dtype, str(plain.dtype)), plain.shape)
    digest.update(_bits(plain).numpy())
    return digest.hexdigest()


def _is_distinctive(plain: torch.Tensor, original: torch.Tensor | None = None) -> bool:
    """Whether a tensor is distinctive, see `tensor_contents`. `original`: the tensor that `plain` is a cast of; values that only
    the cast made infinite do not count."""
    size = plain.element_size()
    if not plain.is_floating_point() or size not in MIN_DISTINCT or plain.numel() < MIN_DISTINCT[size]:
        return False
    every = slice(None, None, max(1, plain.numel() // SAMPLE))
    values = (plain if original is None else original).flatten()[every]
    return len(plain.flatten()[every].view(INTEGERS[size]).unique()) >= MIN_DISTINCT[size] or not bool(values.isfinite().all())


def _kind(tensor: torch.Tensor) -> str:
    return "floating" if tensor.is_floating_point() else str(tensor.dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
