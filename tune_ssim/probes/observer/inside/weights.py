"""Where the weights come from: files that were opened, keys that did not fit, and values before the first update against files.

Tensors are compared by a few elements of their first, middle and last row, so that no file is read as a whole.
"""

from __future__ import annotations

import functools
import os

from .events import guarded
from .modules import clean, kind_of

ELEMENTS = 16  # of each of three rows
NAMES = 8  # named in an event; counts are complete
MAX_TENSORS = 100_000
STRIPPED = 3  # leading parts of a key that may belong to a container: `model.`, `state_dict.`, `ema.`

LOADED: dict = {}  # path → {key: sample} of files that the program read whole
OPENED: dict = {}  # path → function that reads the samples, of files that it opened
SOURCES: dict = {}  # address of a tensor's data → path


def install(events, module) -> None:
    """Wraps what a program reads weights with: `torch.load`, safetensors, `Module.load_state_dict`."""
    name = module.__name__
    if name == "torch.serialization":
        module.load = _reader(events, module.load, "torch.load")
    elif name == "safetensors.torch":
        module.load_file = _reader(events, module.load_file, "safetensors.load_file")
    elif name == "safetensors":
        original = module.safe_open
        remember = guarded(events)(lambda path: OPENED.setdefault(os.path.abspath(path), functools.partial(_open, original)))

        @functools.wraps(original, updated=())
        def safe_open(filename, *args, **kwargs):
            opened = original(filename, *args, **kwargs)
            remember(os.fspath(filename))
            return opened

        module.safe_open = safe_open
    else:
        _install_load_state_dict(events, module.Module)


def _reader(events, original, call):
    @functools.wraps(original)
    def read(f, *args, **kwargs):
        found = original(f, *args, **kwargs)
        remember(f, found)
        return found

    @guarded(events)
    def remember(f, found) -> None:
        if isinstance(f, (str, os.PathLike)):
            path = os.path.abspath(os.fspath(f))
            tensors = dict(_tensors(found))
            if tensors:
                LOADED[path] = {key: sample_of(tensor) for key, tensor in tensors.items()}
                SOURCES.update({tensor.data_ptr(): path for tensor in tensors.values() if tensor.numel()})
                events.write("read", call=call, path=path, tensors=len(tensors))

    return read


def _install_load_state_dict(events, base) -> None:
    original = base.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self, state_dict, *args, **kwargs):
        result = original(self, state_dict, *args, **kwargs)
        report(self, state_dict, result)
        return result

    @guarded(events)
    def report(module, state_dict, result) -> None:
        tensors = [value for value in state_dict.values() if hasattr(value, "data_ptr")]
        path = next((SOURCES[t.data_ptr()] for t in tensors if t.device.type != "meta" and t.data_ptr() in SOURCES), None)
        missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
        events.write(
            "load_state_dict",
            module=type(module).__name__,
            keys=len(state_dict),
            path=path,
            missing=len(missing),
            unexpected=len(unexpected),
            missing_names=missing[:NAMES],
            unexpected_names=unexpected[:NAMES],
        )

    base.load_state_dict = load_state_dict


def describe_weights(events, roots, trained, parameters, files) -> None:
    """An event for each module with parameters: how many train, and how it compares with each file. files: named by the study."""
    import torch

    known = dict(LOADED)
    for path, read in OPENED.items():
        if path not in known and os.path.exists(path):
            known[path] = read(path)
    asked = {os.path.abspath(path) for path in files}
    for path in asked - set(known):
        known[path] = _samples_of_file(events, path)
    optimised = {id(p) for p in parameters}
    own = {id(module) for module in trained}
    for module in sorted(roots, key=lambda one: id(one) not in own):
        named = {clean(name): p.detach() for name, p in module.named_parameters()}
        trainable = sum(1 for p in module.parameters() if id(p) in optimised and p.requires_grad)
        is_sharded = any(hasattr(p, "to_local") or type(p).__name__ == "FlatParameter" for p in module.parameters())
        values = {} if is_sharded else {name: sample_of(p) for name, p in named.items() if isinstance(p, torch.Tensor)}
        compared = [{**_compare(values, path, samples), "named": path in asked} for path, samples in known.items()]
        compared = [one for one in compared if one["of"]]
        equal = set().union(*(one.pop("equal_names") for one in compared)) if compared else set()
        fresh = [name for name, sample in values.items() if name not in equal]
        events.write(
            "weights",
            module=kind_of(module),
            is_trained=id(module) in own,
            tensors=len(named),
            trainable=trainable,
            sharded=is_sharded,
            files=compared,
            in_no_file=len(fresh) if known and not is_sharded else None,
            in_no_file_names=fresh[:NAMES] if known else [],
        )


def _compare(values, path, samples):
    """values, samples: name → sample. A name may have a container's name in front of it in the file."""
    place: dict = {}
    for key in samples:
        parts = clean(key).split(".")
        for start in range(min(STRIPPED, len(parts) - 1) + 1):
            name = ".".join(parts[start:])
            if name in values:
                place.setdefault(name, key)
                break
    # Biases of 0 and scales of 1 are equal in any two new models and tell nothing.
    telling = {name: key for name, key in place.items() if set(samples[key][1]) not in ({0.0}, {1.0})}
    equal = {name for name, key in telling.items() if _same(values[name], samples[key])}
    rounded = {name for name, key in telling.items() if name not in equal and _same(values[name], samples[key], "bfloat16")}
    different = [name for name in telling if name not in equal and name not in rounded]
    missing = [name for name in values if name not in place]
    return {
        "path": path,
        "of": len(telling),
        "equal": len(equal),
        "rounded": len(rounded),
        "equal_names": equal | rounded | (set(place) - set(telling)),
        "different": len(different),
        "different_names": different[:NAMES],
        "missing": len(missing),
        "missing_names": missing[:NAMES],
        "unused": len(samples) - len(place),
    }


def sample_of(tensor):
    """(shape, elements in float32 of its first, middle and last row, the name of its type)."""
    import torch

    with torch.no_grad():
        whole = tensor.detach()
        if not whole.numel():
            return tuple(whole.shape), (), str(whole.dtype)
        rows = [whole.reshape(1, -1)] if whole.dim() < 2 else [whole[i : i + 1] for i in _rows(whole.shape[0])]
        flat = [row.reshape(-1) for row in rows]
        elements = torch.cat([row[:: max(1, row.numel() // ELEMENTS)][:ELEMENTS] for row in flat])
        return tuple(whole.shape), tuple(elements.float().tolist()), str(whole.dtype)


def _rows(count):
    return sorted({0, count // 2, count - 1})


def _same(one, other, precision=None) -> bool:
    """Equal up to the coarser of the two types, since a checkpoint may be stored in bfloat16, or up to `precision`."""
    import torch

    if one[0] != other[0]:
        return False
    if precision is None and one[2] == other[2]:
        return one[1] == other[1]
    types = [getattr(torch, name.replace("torch.", "")) for name in (one[2], other[2], precision) if name]
    coarse = max(types, key=lambda kind: torch.finfo(kind).eps if kind.is_floating_point else 0)
    a, b = (torch.tensor(side[1]).to(coarse) for side in (one, other))
    return bool(torch.equal(a, b))


def _tensors(thing, prefix="", depth=0):
    import torch

    if isinstance(thing, torch.Tensor):
        yield prefix, thing
    elif isinstance(thing, dict) and depth < 4:
        for key, value in list(thing.items())[:MAX_TENSORS]:
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _open(safe_open, path):
    found = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            part = file.get_slice(key)
            shape = tuple(part.get_shape())
            if len(shape) < 2:
                found[key] = sample_of(file.get_tensor(key))
            else:
                rows = [sample_of(part[i : i + 1]) for i in _rows(shape[0])]
                found[key] = shape, tuple(x for row in rows for x in row[1]), rows[0][2]
    return found


def _samples_of_file(events, path):
    import torch

    if not os.path.exists(path):
        events.note(f"{path}: not there, so no weights could be compared with it")
        return {}
    if path.endswith(".safetensors"):
        import safetensors

        original = getattr(safetensors.safe_open, "__wrapped__", safetensors.safe_open)
        return _open(original, path)
    load = getattr(torch.load, "__wrapped__", torch.load)
    return {key: sample_of(tensor) for key, tensor in _tensors(load(path, map_location="cpu", weights_only=True, mmap=True))}
