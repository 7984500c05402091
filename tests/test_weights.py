"""Hashes of tensors and the comparison of a network with its file: on the bundled networks, and on every kind of wrong file."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tune_ssim.base.errors import BadSetup
from tune_ssim.base.tensor_file import PARENTS, Contents, TensorFile, parents_metadata
from tune_ssim.probes import compare_with_file, content_id, tensor_contents, tensor_hashes
from tune_ssim.probes.weights import DTYPE_NAMES, untrained_norms
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.fundus_sr import WEIGHTS, FundusSR
from tune_ssim.trials.checkpoint import tensors_of

DENOISER = WEIGHTS / "fundus_denoiser.safetensors"
DTYPES = sorted(DTYPE_NAMES, key=str)


def one_hash(tensor: torch.Tensor) -> str:
    return tensor_hashes({"x": tensor})["x"]


# ---- hashes


def test_a_hash_is_that_of_dtype_shape_and_bytes() -> None:
    numbers = [0.0, -0.0, 1.5, float("nan"), float("inf"), -2.0]
    expected = hashlib.sha256(b"F32 [2, 3]\n" + struct.pack("<6f", *numbers)).hexdigest()
    assert one_hash(torch.tensor(numbers).reshape(2, 3)) == expected
    assert one_hash(torch.tensor(True)) == hashlib.sha256(b"BOOL []\n\x01").hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_in_memory_and_in_a_file_have_one_hash(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.arange(12).reshape(3, 4) % 5).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "long": (torch.arange(300_000) % 2).to(dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert TensorFile.open(tmp_path / "a.safetensors").hashes() == tensor_hashes(tensors)


def test_what_changes_a_hash_and_what_does_not() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    same = [x.T.contiguous().T, torch.nn.Parameter(x), torch.stack([x, x], dim=-1)[..., 0], x.double().float()]
    assert {one_hash(tensor) for tensor in same} == {one_hash(x)}
    other = [x.T, x.flatten(), x.double(), x.half(), -x, x + 1e-6, torch.zeros(3, 4), -torch.zeros(3, 4), x.int()]
    assert len({one_hash(tensor) for tensor in [x, *other]}) == 1 + len(other)
    z = torch.complex(x, x)
    assert one_hash(z.conj()) == one_hash(torch.complex(x, -x)) != one_hash(z)


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_a_tensor_without_bytes_is_named(tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"weight: .* no bytes"):
        tensor_hashes({"weight": tensor})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_has_the_same_hash() -> None:
    tensors = {str(dtype): torch.arange(5000).reshape(50, 100).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)}
    assert tensor_contents({name: tensor.cuda().T for name, tensor in tensors.items()}) == tensor_contents(
        {name: tensor.T for name, tensor in tensors.items()}
    )


@given(st.dictionaries(st.text(max_size=3), st.sampled_from(["a" * 64, "b" * 64, "c" * 64])), st.randoms())
def test_the_content_id_knows_neither_names_nor_order_nor_copies(hashes: dict[str, str], random: Any) -> None:
    values = list(set(hashes.values()))
    random.shuffle(values)
    assert content_id({str(place): value for place, value in enumerate(values)}) == content_id(hashes)
    assert content_id({**hashes, "new": "d" * 64}) != content_id(hashes)


# ---- what a training is recognised by


def is_distinctive(tensor: torch.Tensor) -> bool:
    return bool(tensor_contents({"x": tensor}).distinctive)


def test_what_others_have_as_well_is_not_distinctive() -> None:
    healthy_everywhere = [
        torch.tensor(50.0),  # AdamW's step
        torch.zeros(10_000),
        torch.ones(10_000, dtype=torch.bfloat16),
        torch.triu(torch.full((100, 100), -1e4)),  # an attention mask
        torch.arange(100_000),  # positions; a permutation from the same seed
        torch.randn(15),
        torch.randn(500).bfloat16(),
        torch.randn(100_000).to(torch.float8_e4m3fn),
        torch.full((15,), torch.nan),
    ]
    assert not any(map(is_distinctive, healthy_everywhere))
    of_one_training = [
        torch.randn(48),
        torch.randn(20_000).bfloat16(),
        torch.randn(20, dtype=torch.float64),
        torch.full((48,), torch.nan),
    ]
    assert all(map(is_distinctive, of_one_training))


def test_a_cast_is_known_by_the_same_entry() -> None:
    x = torch.randn(50, 100)
    (own, *casts) = next(iter(tensor_contents({"x": x}).distinctive.values()))
    assert own == one_hash(x)
    assert set(casts) == {one_hash(x.half()), one_hash(x.bfloat16())}
    (versions,) = tensor_contents({"x": x.bfloat16()}).distinctive.values()
    assert set(versions) == {one_hash(x.bfloat16()), one_hash(x.bfloat16().float()), one_hash(x.bfloat16().half())}


def test_a_cast_that_anybody_could_have_is_left_out() -> None:
    """AdamW's second moments vanish in half precision; a number beyond 65504 becomes infinite there."""
    for x in (torch.rand(50, 100) * 1e-12, torch.rand(50, 100) * 1e6 + 1e6, 1 + torch.rand(50, 100) * 1e-4):
        (versions,) = tensor_contents({"x": x}).distinctive.values()
        assert one_hash(x.half()) not in versions


def test_contents_are_plain_json() -> None:
    contents = tensor_contents({"x": torch.randn(50, 100), "y": torch.zeros(1)})
    assert Contents(**asdict(contents)) == contents
    assert contents.id == content_id(contents.hashes)


def test_a_ruined_training_and_a_healthy_one_share_nothing_distinctive() -> None:
    """The hardest case measured: AdamW's first updates at a learning rate so small that 16 bits hardly see them, from the same
    start with the same batches. What they share there is short."""

    def state(gain: float) -> dict[str, torch.Tensor]:
        task = FundusSR()
        task.setup({"preset": "adamw_clip", "lr": 2.5e-6, "ssim_loss_weight": gain, "ssim_loss_max_t": 1.0}, seed=0, device="cpu")
        for _ in range(3):
            task.step()
        return tensors_of(task.state_dict())

    ruined, healthy = state(3000.0), state(16.0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one, other = (
            tensor_contents({name: tensor.to(dtype) for name, tensor in tensors.items()}) for tensors in (ruined, healthy)
        )
        assert not set(one.distinctive) & set(other.hashes.values())
    shared = [name for name, x in ruined.items() if x.numel() > 16 and torch.equal(x.bfloat16(), healthy[name].bfloat16())]
    assert shared  # so the line had something to keep out
    assert len(tensor_contents(ruined).distinctive) > 100  # and it does not keep out everything


# ---- a network and its file


def denoiser() -> Denoiser:
    network = Denoiser()
    network.load_state_dict(load_file(DENOISER))
    return network


@pytest.mark.parametrize(("network", "name"), [(Denoiser, "fundus_denoiser"), (VAE, "fundus_vae")])
def test_the_bundled_networks(network: type[torch.nn.Module], name: str) -> None:
    file = WEIGHTS / f"{name}.safetensors"
    loaded = network()
    untrained = compare_with_file(loaded, file)
    assert untrained.fresh
    assert not untrained.equal
    assert untrained.equal_fraction < 0.01
    loaded.load_state_dict(load_file(file))
    found = compare_with_file(loaded, file)
    assert found.equal
    assert found.equal_fraction == 1
    assert not found.metadata_missing
    assert found.fresh is False
    assert found.norm_parameters > 3


def test_one_number_that_differs() -> None:
    network = denoiser()
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] += 1e-6
    found = compare_with_file(network, DENOISER)
    total = sum(tensor.numel() for tensor in network.state_dict().values())
    assert found.different == ("conv_in.weight",)
    assert found.equal_fraction == (total - 1) / total


def test_missing_unexpected_and_mismatched(tmp_path: Path) -> None:
    tensors = load_file(DENOISER)
    tensors["conv_inn.bias"] = tensors.pop("conv_in.bias")
    tensors["conv_out.weight"] = torch.zeros(4, 40, 3, 3)
    tensors["norm_out.bias"] = torch.zeros(48, dtype=torch.int32)
    save_file(tensors, tmp_path / "a.safetensors")
    found = compare_with_file(denoiser(), tmp_path / "a.safetensors")
    assert found.missing == ("conv_in.bias",)
    assert found.unexpected == ("conv_inn.bias",)
    assert found.mismatched == {
        "conv_out.weight": "[4, 48, 3, 3] float32 in the module, [4, 40, 3, 3] float32 in the file",
        "norm_out.bias": "[48] float32 in the module, [48] int32 in the file",
    }
    assert found.different == ()
    assert 0.98 < found.equal_fraction < 1
    assert found.metadata_missing
    assert not found.equal


def test_half_of_the_tensors_are_missing(tmp_path: Path) -> None:
    tensors = load_file(DENOISER)
    save_file({name: tensors[name] for name in sorted(tensors)[::2]}, tmp_path / "a.safetensors")
    found = compare_with_file(denoiser(), tmp_path / "a.safetensors")
    assert len(found.missing) == len(tensors) // 2
    assert found.different == ()


def test_a_network_in_half_precision_holds_its_file() -> None:
    found = compare_with_file(denoiser().bfloat16(), DENOISER)
    assert found.equal
    assert found.equal_fraction == 1


def test_values_that_are_not_finite_are_compared_by_their_bits(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, torch.nan)
    save_file(layer.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert compare_with_file(layer, tmp_path / "a.safetensors").equal


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("nothing", torch.zeros(0))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    network = Tied()
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name != "head.weight"}
    save_file(tensors, tmp_path / "a.safetensors")
    assert compare_with_file(network, tmp_path / "a.safetensors").equal
    network.head.weight = torch.nn.Parameter(torch.zeros(5, 3))
    assert compare_with_file(network, tmp_path / "a.safetensors").missing == ("head.weight",)


def test_without_norms_it_cannot_be_told_whether_a_network_is_fresh(tmp_path: Path) -> None:
    save_file(torch.nn.Linear(3, 3).state_dict(), tmp_path / "a.safetensors")
    found = compare_with_file(torch.nn.Linear(3, 3), tmp_path / "a.safetensors")
    assert found.fresh is None
    assert found.equal_fraction == 0


def test_one_step_of_training_and_a_network_is_not_fresh() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    found = []
    for _ in range(2):
        found.append(untrained_norms(network))
        network(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    assert found == [("1.weight", "1.bias"), ()]


# ---- what is refused


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def healthy_bytes() -> bytes:
    return DENOISER.read_bytes()


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


WRONG_BYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "truncated header": (lambda: healthy_bytes()[:100], "not a whole safetensors file"),
    "truncated data": (lambda: healthy_bytes()[:-1], "not a whole safetensors file"),
    "something after the end": (lambda: healthy_bytes() + b"\0", "not a whole safetensors file"),
    "corrupt header": (lambda: healthy_bytes()[:20] + b"\xff" + healthy_bytes()[21:], "not a whole safetensors file"),
    "huge header": (lambda: struct.pack("<Q", 1 << 62) + b"{}", "not a whole safetensors file"),
    "overlap": (
        lambda: header(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"12345678",
        ),
        "not a whole safetensors file",
    ),
    "deep": (lambda: header(b"[" * 5000 + b"]" * 5000), "not a whole safetensors file"),
    "text": (lambda: b"<!DOCTYPE html>" * 9, "not a whole safetensors file"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "zip": (lambda: b"PK\x03\x04" + b"\0" * 99, "zip archive"),
    "holds no tensors": (lambda: header(b"{}"), "holds no tensors"),
}


def refusal(path: Path) -> str:
    with pytest.raises(BadSetup) as caught:
        compare_with_file(torch.nn.Linear(1, 1), path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("kind", WRONG_BYTES)
def test_anything_but_safetensors_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    make, words = WRONG_BYTES[kind]
    (tmp_path / name).write_bytes(make())
    assert words in refusal(tmp_path / name)


def test_a_place_without_a_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.safetensors")
    assert "is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refusal(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pickle 0", "pickle 2", "pickle 5", "torch", "torch old"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str, kind: str) -> None:
    file, mark = tmp_path / name, tmp_path / "executed"
    with file.open("wb") as stream:
        if kind.startswith("torch"):
            torch.save({"x": Bomb(mark)}, stream, _use_new_zipfile_serialization=kind == "torch")
        else:
            pickle.dump(Bomb(mark), stream, protocol=int(kind[-1]))
    message = refusal(file)
    assert kind == "pickle 0" or "pickle" in message  # protocol 0 is plain text
    assert not mark.exists()
    if kind.startswith("pickle"):  # the bomb is a real one
        pickle.loads(file.read_bytes())
        assert mark.exists()


def test_a_file_that_begins_like_a_pickle_by_chance_is_read(tmp_path: Path) -> None:
    """A header of 640 bytes: 0x80 0x02, as a pickle of protocol 2 begins."""
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "a.safetensors").write_bytes(header(text.ljust(640), b"\x07"))
    assert TensorFile.open(tmp_path / "a.safetensors").hashes() == {"x": one_hash(torch.tensor([7], dtype=torch.uint8))}


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1000)}, file)
    opened = TensorFile.open(file)
    os.truncate(file, 2000)
    with pytest.raises(BadSetup, match="ends in the middle of tensor 'x'"):
        opened.hashes()
    file.unlink()
    with pytest.raises(BadSetup, match="No such file"):
        opened.hashes()


# ---- declared parents


def test_declared_parents_come_back(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"x": torch.randn(4)}
    save_file(tensors, file)
    assert TensorFile.open(file).parents() == ()
    save_file(tensors, file, metadata=parents_metadata(["a" * 64, "b" * 64, "a" * 64]))
    opened = TensorFile.open(file)
    assert opened.parents() == ("a" * 64, "b" * 64)
    assert opened.ancestry() == (content_id(tensor_hashes(tensors)), "a" * 64, "b" * 64)


def test_what_is_no_content_id_is_not_declared() -> None:
    with pytest.raises(ValueError, match=r"64 hexadecimal digits.*'fundus'"):
        parents_metadata(["a" * 64, "fundus"])


@pytest.mark.parametrize("text", ["", "{}", '"abc"', "[1]", '["xyz"]', "[" * 100_000], ids=str.__len__)
def test_an_ancestry_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={PARENTS: text})
    with pytest.raises(BadSetup, match=f"{PARENTS}.*content ids"):
        TensorFile.open(tmp_path / "a.safetensors").parents()
