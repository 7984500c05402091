"""The modules that own an optimiser's parameters. An optimiser does not know names, so they are looked up in the process."""

from __future__ import annotations

import gc
import sys

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # DDP, torch.compile, FSDP, checkpoints


def all_roots():
    """Modules with parameters that are no part of another module, in the order of their creation."""
    base = sys.modules["torch.nn.modules.module"].Module
    kinds = {base, *_subclasses(base)}
    modules = [thing for thing in gc.get_objects() if type(thing) in kinds]  # isinstance would wake up proxies
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    return [module for module in modules if id(module) not in inner and next(module.parameters(), None) is not None]


def _subclasses(kind):
    for child in type.__subclasses__(kind):
        yield child
        yield from _subclasses(child)


def modules_of(roots, parameters):
    """The smallest of the modules `roots` that own `parameters`, one for each group of them."""
    wanted = {id(p) for p in parameters}
    owners = [(module, {id(p) for p in module.parameters()}) for module in roots]
    owners = sorted((one for one in owners if one[1] & wanted), key=lambda one: len(one[1]))
    found: list = []
    covered: set = set()
    for module, ids in owners:
        if not (ids & wanted) <= covered:
            found.append(module)
            covered |= ids
    return found


def kind_of(module) -> str:
    """The name of a module's class, or of the module that it wraps."""
    inner = next((module._modules[name] for name in WRAPPERS if module._modules.get(name) is not None), None)
    return type(module).__name__ if inner is None or len(module._modules) > 1 else kind_of(inner)


def clean(name: str) -> str:
    """A parameter's name without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def tags_of(modules, parameters):
    """Trainable parameters by top-level module; of a module with a single child, by its children."""
    wanted = {id(p) for p in parameters}
    found: dict = {}
    for module in modules:
        named = [(clean(name).split("."), p) for name, p in module.named_parameters() if id(p) in wanted and p.requires_grad]
        while named and len({path[0] for path, _ in named}) == 1 and all(len(path) > 2 for path, _ in named):
            named = [(path[1:], p) for path, p in named]
        for path, p in named:
            tag = path[0] if len(modules) == 1 else f"{type(module).__name__}.{path[0]}"
            found.setdefault(tag, []).append(p)
    return found
