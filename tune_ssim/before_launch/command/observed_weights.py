"""What the observer saw of the weights before the first update: loaded or not, from which file, which layers are new."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_ssim.before_launch.preflight.report import Check, unknown

HALF = 0.5  # of a module's tensors: a file that names fewer belongs to another network
LOAD_REMEDY = "load the checkpoint strictly before the optimiser is made, and check the path"


def check_observed(observed: Mapping[str, Any]) -> Iterator[Check]:
    """observed: `weights`, `loads`, `notes` and `sentence` of an `Observation`; empty if there was no observer."""
    if not observed:
        yield unknown("observer", "the program was started without the observer: nothing is known of its weights")
        return
    modules: Sequence[Mapping[str, Any]] = observed["weights"]
    yield Check("observer", "ok" if modules else "unknown", observed["sentence"])
    for module in modules:
        others = {file["path"] for other in modules if other is not module for file in other["files"] if file["equal"]}
        yield from _module(module, others)
    yield from _loads(observed["loads"])


def _module(module: Mapping[str, Any], others: Collection[str]) -> Iterator[Check]:
    """others: files that another network equals, such as a teacher of the same architecture."""
    name = f"weights/{module['module']}"
    trained, tensors = int(module["trainable"]), int(module["tensors"])
    part = f"{trained} of {tensors} tensors are trained" if trained else "frozen"
    if module["sharded"]:
        yield unknown(name, f"{part}; sharded over the ranks before its first step: see how its state dict was loaded")
        return
    files = [file for file in module["files"] if file["of"] and file["of"] >= HALF * (file["of"] + file["missing"])]
    if not files:
        if module["is_trained"]:
            yield unknown(name, f"{part}; no file with its weights was opened or named: name it in `task: {{weights: [FILE]}}`")
        return
    best = max(files, key=lambda file: (file["equal"], file["rounded"], file["named"]))
    named = [file for file in files if file["named"]]
    evidence = {key: float(best[key]) for key in ("of", "equal", "rounded", "different", "missing")}
    evidence |= {"tensors": float(tensors), "trained": float(trained)}
    same, file = best["equal"] + best["rounded"], Path(best["path"]).name
    wanted = next((one for one in named if one is not best and one["different"]), None)
    if not same:
        asked = (named or files)[0]
        sentence = f"{part}; none of {best['of']} tensors equals {Path(asked['path']).name}: the pretrained weights were not loaded"
        is_fault = bool(named) or asked["path"] not in others
        yield Check(name, "bad_setup" if is_fault else "warn", sentence, evidence, LOAD_REMEDY)
    elif wanted is not None and not best["named"] and not best["different"]:
        sentence = f"{part}; its weights are those of {file}, not of {Path(wanted['path']).name}"
        yield Check(name, "bad_setup", sentence, evidence, "averaged and raw weights have the same names: choose the right file")
    elif best["different"]:
        names = ", ".join(best["different_names"][:3])
        sentence = f"{part}; {same} of {best['of']} tensors equal {file}, {best['different']} differ ({names})"
        yield Check(name, "bad_setup" if best["named"] else "warn", sentence, evidence, LOAD_REMEDY)
    elif best["missing"]:
        names = ", ".join(best["missing_names"][:3])
        sentence = f"{part}; {same} tensors equal {file}, {best['missing']} are not in it ({names})"
        yield Check(name, "warn", sentence, evidence, "right if these layers are meant to be new")
    else:
        rounded = f", {best['rounded']} of them rounded to bfloat16" if best["rounded"] else ""
        yield Check(name, "ok", f"{part}; all {best['of']} tensors equal {file}{rounded}", evidence)


def _loads(loads: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """State dicts that did not fit, although the program went on."""
    for load in loads:
        if load["event"] != "load_state_dict" or not (load["missing"] or load["unexpected"]):
            continue
        of = f" from {Path(load['path']).name}" if load["path"] else ""
        faults = [
            f"{load[kind]} {kind} keys ({', '.join(load[f'{kind}_names'][:3])})" for kind in ("missing", "unexpected") if load[kind]
        ]
        sentence = f"load_state_dict{of} went on with {' and '.join(faults)}; the file has {load['keys']} keys"
        evidence = {key: float(load[key]) for key in ("keys", "missing", "unexpected")}
        yield Check(f"load/{load['module']}", "warn", sentence, evidence, "right if these layers are meant to be new")
