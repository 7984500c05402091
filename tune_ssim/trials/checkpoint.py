"""Saves nested state as two files, `tensors.safetensors` and `state.json`, and loads it. No pickle, so no code is executed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tune_ssim.base.errors import UserError
from tune_ssim.base.tensor_file import parents_metadata

TENSORS, STATE = "tensors.safetensors", "state.json"
DIGEST = "state_sha256"  # metadata key of the tensor file: hash of the state.json it belongs to


def save_checkpoint(folder: Path, state: Mapping[str, Any], parents: Iterable[str] = ()) -> None:
    """`state`: nested dicts, lists and tuples of tensors and JSON values; keys may be integers, as in optimiser states.
    `parents`: content ids of everything that the state was trained from, stored in the file (`TensorFile.parents` reads them).

    Raises TypeError, naming the place, for any other value; ValueError for a parent that is not a content id."""
    taken: dict[str, torch.Tensor] = {}
    text = json.dumps(_take_apart(state, "", taken)).encode()
    metadata = {"format": "pt", DIGEST: hashlib.sha256(text).hexdigest(), **parents_metadata(parents)}
    # Copied because safetensors cannot store tensors that share memory (tied weights).
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in taken.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is replaced atomically. The digest reveals a kill between the two replacements.
    try:
        save_file(tensors, folder / f".{TENSORS}", metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder / TENSORS)) from None
        raise
    (folder / f".{STATE}").write_bytes(text)
    for name in (TENSORS, STATE):
        (folder / f".{name}").replace(folder / name)


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that `save_checkpoint` would store, under the same names, on their devices and not copied.

    `probes.tensor_contents(tensors_of(state))` identifies the saved file in the quarantine ledger."""
    tensors: dict[str, torch.Tensor] = {}
    _take_apart(state, "", tensors)
    return tensors


def load_checkpoint(folder: Path) -> Any:
    """The state, tensors on the CPU, tuples as lists. Raises UserError for a missing, truncated or foreign file."""
    try:
        text = (folder / STATE).read_bytes()
        with safe_open(folder / TENSORS, framework="pt", device="cpu") as file:
            digest = (file.metadata() or {}).get(DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        if digest != hashlib.sha256(text).hexdigest():
            raise ValueError(f"{STATE} and {TENSORS} do not belong together")
        return _put_together(json.loads(text), tensors)
    except OSError as error:
        raise UserError(f"checkpoint {folder}: {error.strerror or error}") from None
    except Exception as error:  # safetensors and json raise their own types for anything malformed
        raise UserError(f"checkpoint {folder}: not readable ({type(error).__name__}: {error})") from None


def _take_apart(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while name in tensors:  # the keys 1 and "1", or "a/b" and "a" → "b", give the same name
            name += "'"
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise TypeError(f"{name or 'state'}: a key of type {type(key).__name__} cannot be stored; use strings")
        return {"items": [[key, _take_apart(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_apart(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name or 'state'}: {type(value).__name__} cannot be stored; use tensors and JSON values")


def _put_together(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "items" in skeleton:
        return {key: _put_together(item, tensors) for key, item in skeleton["items"]}
    if "list" in skeleton:
        return [_put_together(item, tensors) for item in skeleton["list"]]
    return skeleton["value"]
