"""Nested state ↔ a folder of two files: `tensors.safetensors` and `state.json`. Nothing is pickled, nothing is executed on loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tune_ssim.errors import UserError

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """`state`: nested dicts, lists and tuples of tensors and JSON values; keys may be integers (optimisers have such)."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _take_apart(state, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / STATE).write_text(json.dumps(skeleton))


def load_checkpoint(folder: Path) -> Any:
    """The state, tensors on the CPU, tuples as lists. Raises UserError for a file that is missing, torn or foreign."""
    try:
        tensors = load_file(folder / TENSORS)
        skeleton = json.loads((folder / STATE).read_text())
        return _put_together(skeleton, tensors)
    except OSError as error:
        raise UserError(f"checkpoint {folder}: {error.strerror or error}") from None
    except Exception as error:  # safetensors and json raise their own types for anything malformed
        raise UserError(f"checkpoint {folder}: not readable ({type(error).__name__}: {error})") from None


def _take_apart(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # A copy: tensors that share memory (tied weights) cannot be stored as they are.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
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
