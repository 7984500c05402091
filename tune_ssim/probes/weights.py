"""Weights as they are in memory: their hashes, and whether they are those of their file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tune_ssim.base.errors import BadSetup
from tune_ssim.base.tensor_file import Contents, TensorFile, content_id, tensor_digest

__all__ = [
    "WeightComparison", "compare_with_file", "content_id", "file_contents", "tensor_contents", "tensor_hashes", "untrained_norms",
]  # fmt: skip

SAFETENSORS, TORCH_SAVE = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")  # how files of checkpoints end
# As safetensors spells them, so that a tensor in memory and the same in a file have one hash.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip

# Different values that a tensor must hold to be distinctive, by bytes an element. Compared were ruined (gain 300 to 3000) and
# healthy (0, 0.1, 16) trainings of the bundled task after 1 to 25 steps of SGD and AdamW, lr 2.5e-6 to 5e-3, same start and noise.
# In float32 nothing came out the same in two of them but AdamW's step counters (1 value). Rounded to 16 bits, which swallows small
# updates, tensors of up to 171 values did (a bias of 192 elements at lr 2.5e-6); the next had 933 values and never did.
LEAST_DISTINCT = {8: 16, 4: 16, 2: 512}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # to count bit patterns by, since NaN equals nothing
SAMPLE = 1 << 16  # elements, evenly spaced, in which they are counted: a billion need no sorting
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # in which one training's weights get saved


def tensor_hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name → SHA-256 of dtype, shape and bytes: the same for any device and memory layout, NaN and −0 told apart.

    Raises TypeError for a tensor without plain memory (sparse, quantised, meta)."""
    return {name: _hash(_plain(name, tensor)) for name, tensor in tensors.items()}


def tensor_contents(tensors: Mapping[str, torch.Tensor]) -> Contents:
    """The hashes of all tensors, and for the distinctive ones also those of their casts to float32, float16 and bfloat16: a
    checkpoint that is saved again in half precision is still the same checkpoint.

    Distinctive is a floating-point tensor with enough different values (LEAST_DISTINCT), or whose values are not finite: no
    sound training has it by chance, unlike counters, masks, zeros and ones. A cast that loses this is left out.
    """
    hashes: dict[str, str] = {}
    distinctive: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        plain = _plain(name, tensor)
        hashes[name] = _hash(plain)
        if _is_distinctive(plain):
            casts = (plain.to(dtype) for dtype in PRECISIONS if dtype != plain.dtype)
            distinctive[hashes[name]] = (hashes[name], *(_hash(cast) for cast in casts if _is_distinctive(cast, plain)))
    return Contents(hashes, distinctive)


def file_contents(path: Path) -> Contents | None:
    """`tensor_contents` of a checkpoint that another program wrote: a file of safetensors or of torch.save, or a folder of such.

    One tensor at a time is in memory. A file of torch.save is read with `weights_only`, so that nothing in it is run. None where
    there is no tensor that can be read."""
    hashes: dict[str, str] = {}
    distinctive: dict[str, Sequence[str]] = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in (SAFETENSORS, *TORCH_SAVE):
            try:
                found = tensor_contents(_tensors_in(file))
            except Exception:  # torn or foreign: torch and safetensors raise their own types for anything malformed
                continue
            hashes |= {f"{file.name}:{name}": value for name, value in found.hashes.items()}
            distinctive |= found.distinctive
    return Contents(hashes, distinctive) if hashes else None


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt", device="cpu")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tensors_in(file: Path) -> Mapping[str, torch.Tensor]:
    if file.suffix == SAFETENSORS:
        return _Stored(file)
    found: dict[str, torch.Tensor] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and not value.is_quantized:
                found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                collect(item, f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                collect(item, f"{name}/{index}")

    collect(torch.load(file, map_location="cpu", weights_only=True, mmap=True), "")
    return found


@dataclass(frozen=True)
class WeightComparison:
    """A module against the safetensors file that it must have been loaded from.

    missing: in the module, not in the file. unexpected: in the file, not in the module. mismatched: name → the two shapes (and
    kinds of number) that do not fit. different: same shape, other values; a cast to the module's precision is no difference.
    equal_fraction: share of the module's numbers that are the file's, to the bit. metadata_missing: the file does not say its
    `format`, which some loaders insist on. norm_parameters, untrained: see `untrained_norms`.
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
        """The module holds this file, all of it and nothing else."""
        return not (self.missing or self.unexpected or self.mismatched or self.different)

    @property
    def fresh(self) -> bool | None:
        """True: not one normalisation layer has been trained. False: at least one has. None: there is none to tell by."""
        return len(self.untrained) == self.norm_parameters if self.norm_parameters else None


def compare_with_file(module: torch.nn.Module, path: str | Path) -> WeightComparison:
    """Raises BadSetup, in one line, for anything but a safetensors file with tensors in it; nothing is executed."""
    stored = TensorFile.open(path)
    if not stored.header:
        raise BadSetup(f"{path}: holds no tensors")
    mine = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    places = {_memory(tensor) for name, tensor in mine.items() if name in stored.header and tensor.numel()}
    missing = [name for name in mine if name not in stored.header and _memory(mine[name]) not in places]  # tied: stored once
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
    """The parameters of normalisation layers that are 0 everywhere or 1 everywhere: so they are initialised, and the first
    optimiser step moves them.

    Only these can tell: other layers start from random numbers, which a trained network's may resemble. A network whose
    norms were frozen all along looks untrained, so this is evidence beside a file's hash, not in its place.
    """
    return tuple(name for name, value in _norm_parameters(module).items() if bool((value == 0).all() or (value == 1).all()))


def _norm_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the class's name: LlamaRMSNorm and its like do not derive from torch's. One element is 0 or 1 in any case."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter.detach()
        for prefix, layer in module.named_modules()
        if "norm" in type(layer).__name__.lower()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.numel() > 1
    }


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, no lazy conjugation. One tensor at a time: a second copy of a model may not fit."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{name}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} has no bytes to hash")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _bits(plain: torch.Tensor) -> torch.Tensor:
    """`[elements, bytes]`, not a copy."""
    return plain.flatten().view(torch.uint8).reshape(plain.numel(), plain.element_size())


def _hash(plain: torch.Tensor) -> str:
    digest = tensor_digest(DTYPE_NAMES.get(plain.dtype, str(plain.dtype)), plain.shape)
    digest.update(_bits(plain).numpy())
    return digest.hexdigest()


def _is_distinctive(plain: torch.Tensor, original: torch.Tensor | None = None) -> bool:
    """`original`: what `plain` is a cast of; a value that only the cast made infinite is no evidence."""
    size = plain.element_size()
    if not plain.is_floating_point() or size not in LEAST_DISTINCT or plain.numel() < LEAST_DISTINCT[size]:
        return False
    every = slice(None, None, max(1, plain.numel() // SAMPLE))
    values = (plain if original is None else original).flatten()[every]
    return len(plain.flatten()[every].view(INTEGERS[size]).unique()) >= LEAST_DISTINCT[size] or not bool(values.isfinite().all())


def _kind(tensor: torch.Tensor) -> str:
    return "floating" if tensor.is_floating_point() else str(tensor.dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
