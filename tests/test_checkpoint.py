"""Checkpoints: what goes in comes out to the bit; what is not ours is refused in one line, and executes nothing."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tune_ssim.base.errors import UserError
from tune_ssim.base.tensor_file import TensorFile
from tune_ssim.probes import tensor_hashes
from tune_ssim.trials.checkpoint import DIGEST, STATE, TENSORS, load_checkpoint, save_checkpoint, tensors_of


def same(one: Any, other: Any) -> bool:
    """Equal to the bit; a tuple comes back as a list, NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        if not (isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape):
            return False
        return torch.equal(one.contiguous().flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


def test_same_can_fail() -> None:
    assert not same({"a": torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.float64)})
    assert not same([1], [1.0])
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([torch.zeros(0), torch.tensor(3), torch.tensor([math.nan, -0.0]), torch.ones(2, 3).T])
)
KEYS = st.text(alphabet="ab/'1", max_size=3) | st.integers(0, 11)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(KEYS, STATES, max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, state)
    assert same(state, load_checkpoint(folder))


def test_keys_that_read_the_same_stay_apart(tmp_path: Path) -> None:
    one, two, three, four = (torch.full((1,), float(n)) for n in range(4))
    state = {1: one, "1": two, "a": {"b": three}, "a/b": four}
    save_checkpoint(tmp_path, state)
    assert same(state, load_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int32],
    ids=str,
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"x": (torch.arange(6).reshape(2, 3) % 2).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    save_checkpoint(tmp_path, state)
    assert same(state, load_checkpoint(tmp_path))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()


class Tied(torch.nn.Module):
    """Two layers that share one weight, and a bfloat16 buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 4, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) + self.shift.float()


def training() -> tuple[Tied, torch.optim.AdamW, torch.amp.GradScaler]:
    torch.manual_seed(0)
    model = Tied()
    groups = [{"params": [model.first.weight], "lr": 0.1}, {"params": [model.first.bias, model.second.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), amsgrad=True)
    return model, optimizer, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)


def test_a_training_with_adamw_scaler_and_tied_weights_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, optimizer, scaler = training()
    train(model, optimizer, scaler, range(4))
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    save_checkpoint(tmp_path, {name: part.state_dict() for name, part in parts.items()})
    train(model, optimizer, scaler, range(4, 9))

    other, other_optimizer, other_scaler = training()
    state = load_checkpoint(tmp_path)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    other_scaler.load_state_dict(state["scaler"])
    assert other.second.weight is other.first.weight
    train(other, other_optimizer, other_scaler, range(4, 9))

    assert same(model.state_dict(), dict(other.state_dict()))
    assert same(optimizer.state_dict(), other_optimizer.state_dict() | {"param_groups": groups_of(other_optimizer)})
    assert scaler.state_dict() == other_scaler.state_dict()
    assert scaler.get_scale() > 4.0  # it moved, so it was worth storing


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """As they would be loaded again: `betas` is a list."""
    return [{**group, "betas": list(group["betas"])} for group in optimizer.state_dict()["param_groups"]]


def test_what_was_loaded_survives_the_next_save_to_the_same_folder(tmp_path: Path) -> None:
    """safetensors maps files into memory: an optimiser that keeps the loaded tensors must not see them change."""
    state = {"x": torch.arange(100_000).double()}
    save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"x": torch.zeros(3)})
    assert same(state, loaded)


def test_a_view_is_stored_without_the_rest_of_its_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"x": torch.zeros(1_000_000)[:3]})
    assert (tmp_path / TENSORS).stat().st_size < 1000


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": [0, object()]}}, "/a/b/1: object"),
        ({"a": b"bytes"}, "/a: bytes"),
        ({"a": {(1, 2): 0}}, "/a: a key of type tuple"),
        ({"a": {1, 2}}, "/a: set"),
        ({"generator": torch.Generator()}, "/generator: Generator"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, state: Any, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        save_checkpoint(tmp_path / "new", state)
    assert not (tmp_path / "new").exists()


# ---- what the ledger of ruined checkpoints knows a checkpoint by


def test_the_tensors_of_a_state_are_those_of_its_file(tmp_path: Path) -> None:
    model, optimizer, scaler = training()
    train(model, optimizer, scaler, range(2))
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    state = {
        **{name: part.state_dict() for name, part in parts.items()},
        "view": torch.arange(12.0).reshape(3, 4).T,
        1: [torch.ones(())],
    }
    save_checkpoint(tmp_path, state)
    tensors = tensors_of(state)
    assert same(tensors, {name: load_file(tmp_path / TENSORS)[name] for name in tensors})
    assert tensor_hashes(tensors) == TensorFile.open(tmp_path / TENSORS).hashes()
    assert tensors["/model/first.weight"].data_ptr() == model.first.weight.data_ptr()  # not a copy


def test_parents_are_kept_in_the_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "first", {"x": torch.zeros(3)})
    first = TensorFile.open(tmp_path / "first" / TENSORS)
    assert first.parents() == ()
    save_checkpoint(tmp_path / "second", {"x": torch.ones(3), "step": 1}, parents=first.ancestry())
    second = TensorFile.open(tmp_path / "second" / TENSORS)
    assert second.parents() == first.ancestry()
    assert len(second.ancestry()) == 2
    assert load_checkpoint(tmp_path / "second")["step"] == 1


def test_a_parent_that_is_no_content_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="content ids"):
        save_checkpoint(tmp_path / "new", {"x": torch.zeros(3)}, parents=["fundus_denoiser.safetensors"])
    assert not (tmp_path / "new").exists()


# ---- what is refused


def saved(folder: Path) -> Path:
    save_checkpoint(folder, {"x": torch.arange(1000.0), "step": 3})
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {folder}: ")
    assert "\n" not in message
    assert caught.value.__suppress_context__
    return message


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).unlink()
    assert "No such file" in refused(tmp_path)


def test_no_folder_or_a_file_in_its_place(tmp_path: Path) -> None:
    refused(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file")


@pytest.mark.parametrize("name", [TENSORS, STATE])
@pytest.mark.parametrize("keep", [0, 1, 8, 40, -1])
def test_a_truncated_file(tmp_path: Path, name: str, keep: int) -> None:
    file = saved(tmp_path) / name
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_a_file_of_another_checkpoint(tmp_path: Path, name: str) -> None:
    """As after a kill between the two files: the weights of one step beside the counters of another."""
    saved(tmp_path / "a")
    save_checkpoint(tmp_path / "b", {"x": torch.zeros(1000), "step": 4})
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    assert "do not belong together" in refused(tmp_path / "a")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [TENSORS, STATE])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str, kind: str) -> None:
    folder, mark = saved(tmp_path / "checkpoint"), tmp_path / "executed"
    with (folder / name).open("wb") as file:
        pickle.dump(Bomb(mark), file) if kind == "pickle" else torch.save({"x": Bomb(mark)}, file)
    refused(folder)
    assert not mark.exists()
    if kind == "pickle":  # the bomb is a real one
        pickle.loads((folder / name).read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "3",
        '{"items": 3}',
        '{"tensor": "absent"}',
        '{"items": [[{}, {"value": 1}]]}',
        "[" * 9999,
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_foreign_json(tmp_path: Path, text: str, signed: bool) -> None:
    """`signed`: with the right digest beside it, as somebody could make on purpose."""
    (saved(tmp_path) / STATE).write_text(text)
    if signed:
        digest = hashlib.sha256(text.encode()).hexdigest()
        save_file({"x": torch.zeros(1)}, tmp_path / TENSORS, metadata={DIGEST: digest})
    refused(tmp_path)


def test_a_safetensors_file_from_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)  # the same tensors, without our metadata
    assert "do not belong together" in refused(tmp_path)


def test_our_json_is_only_json(tmp_path: Path) -> None:
    assert json.loads((saved(tmp_path) / STATE).read_text())["items"][1] == ["step", {"value": 3}]
