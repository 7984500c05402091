"""Any folder of images: every mode, broken files, splits that stay, crops that depend on seed and step alone."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from tune_ssim.base.errors import UserError
from tune_ssim.study.study import load_study
from tune_ssim.tasks import image_folder
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.tasks.image_folder import FolderImages, PixelCache, Unreadable, load_folder_images, read_pixels


def picture(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    """Smooth random colours, `[height, width, 3]` uint8."""
    small = np.random.default_rng(seed).integers(40, 255, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def folder_of(folder: Path, count: int = 12, **shape: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(i, **shape)).save(folder / f"{i:02}.png")
    return folder


def read(path: Path, side: int | None = None) -> np.ndarray:
    return read_pixels(path.read_bytes(), side)


def unit(path: Path) -> np.ndarray:
    pixels = read(path)
    return pixels.astype(np.float64) / image_folder.WHITE[pixels.dtype.name]


GREY = np.linspace(0, 1, 64 * 80).reshape(64, 80)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((f"x.{suffix}", "RGB") for suffix in ("png", "bmp", "tif", "ppm")),
        ("x.png", "L"), ("x.png", "1"), ("x.png", "P"), ("x.tif", "CMYK"), ("x.PNG", "I;16"), ("x.tif", "I;16"), ("x.tif", "F"),
    ],
)  # fmt: skip
def test_every_mode_is_read_on_the_scale_of_its_white(tmp_path: Path, name: str, mode: str) -> None:
    if mode == "F":
        image, expected = Image.fromarray(GREY.astype(np.float32)), GREY[..., None]
    elif mode == "I;16":
        numbers = (GREY * 65535).round().astype(np.uint16)
        image, expected = Image.fromarray(numbers), numbers[..., None] / 65535
    else:
        image = Image.fromarray(picture(1)).convert(mode)
        expected = np.asarray(image.convert("RGB")) / 255
    image.save(tmp_path / name)
    assert image.mode == mode
    assert np.abs(unit(tmp_path / name) - expected).max() < 1e-6


@pytest.mark.parametrize(("suffix", "limit"), [("jpg", 0.03), ("webp", 0.06)])
def test_lossy_formats(tmp_path: Path, suffix: str, limit: float) -> None:
    Image.fromarray(picture(2)).save(tmp_path / f"x.{suffix}", quality=95)
    assert np.abs(unit(tmp_path / f"x.{suffix}") - picture(2) / 255).mean() < limit


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture(3)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[255] * 40 + [0] * 40], 64, axis=0).astype(np.uint8)))
    image.convert(mode).save(tmp_path / "x.png")
    found = unit(tmp_path / "x.png")
    assert found.shape == (64, 80, 3) and found[:, 41:].max() == 0 and found[:, :40].mean() > 0.2


def test_exif_orientation_and_16_bit_orientation(tmp_path: Path) -> None:
    upright, exif = picture(4), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read(tmp_path / "x.png"), upright)
    Image.fromarray(np.rot90((GREY * 65535).astype(np.uint16)).copy()).save(tmp_path / "y.png", exif=exif)
    assert read(tmp_path / "y.png").shape == (64, 80, 1)


def test_the_shorter_side_is_reduced_by_averaging(tmp_path: Path) -> None:
    Image.fromarray(picture(5, 128, 160)).save(tmp_path / "x.png")
    blocks = picture(5, 128, 160).reshape(64, 2, 80, 2, 3).mean(axis=(1, 3))
    assert np.abs(read(tmp_path / "x.png", 64) - blocks).max() <= 1
    assert read(tmp_path / "x.png", 500).shape == (128, 160, 3)
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "f.tif")
    assert read(tmp_path / "f.tif", 32).shape == (32, 40, 1)


def broken_files(folder: Path) -> dict[str, str]:
    """Makes them; name → what must be said."""
    Image.fromarray(picture(0)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("not an image")
    Image.fromarray(picture(0, 20, 90)).save(folder / "flat.png")
    Image.fromarray((GREY * 255).astype(np.float32)).save(folder / "bytes.tif")
    Image.fromarray(np.full((64, 80), np.nan, np.float32)).save(folder / "nan.tif")
    Image.fromarray(np.full((64, 80), 70_000, np.int32)).save(folder / "wide.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return {
        "torn.jpg": "truncated", "empty.png": "empty", "words.png": "no image that can be read",
        "flat.png": "less than a crop of 48", "bytes.tif": "valid: 0 to 1", "nan.tif": "NaN", "wide.tif": "valid: 0 to 65535",
        "gone.png": "no such file", "pipe.png": "not a regular file",
    }  # fmt: skip


def test_unusable_files_are_named_and_skipped_or_refused(tmp_path: Path) -> None:
    folder_of(tmp_path)
    expected = broken_files(tmp_path)
    images = load_folder_images(tmp_path, 48)
    assert set(images.left_out) == set(expected)
    for name, words in expected.items():
        assert words in images.left_out[name]
    assert len(images.train) + len(images.held_out) == 12
    for many in range(12):
        (tmp_path / f"many{many:02}.png").touch()
    with pytest.raises(UserError, match=r"21 files cannot be used: .*; and 1 more; remove them, or say data_errors: skip") as error:
        load_folder_images(tmp_path, 48, errors="refuse")
    named = [name for name in (*expected, *(f"many{many:02}.png" for many in range(12))) if f"{name} (" in str(error.value)]
    assert len(named) == 20  # the first ones, each with its reason


def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (300, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 300 * 300 - 1)
    with pytest.raises(Unreadable, match="300 x 300 pixels, more than"):
        read(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow's own limit: twice this is an error
    with pytest.raises(Unreadable, match="more than"):
        read(tmp_path / "x.png")


def test_hidden_files_sub_folders_links_and_copies(tmp_path: Path) -> None:
    folder_of(tmp_path / "a" / "b", 6)
    folder_of(tmp_path / ".hidden", 9)
    Image.fromarray(picture(100)).save(tmp_path / "._00.png")
    (tmp_path / "labels.csv").write_text("name,grade\n")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    outside = folder_of(tmp_path.parent / "outside", 8)
    (tmp_path / "link").symlink_to(outside, target_is_directory=True)
    images = load_folder_images(tmp_path, 48)
    assert not images.left_out
    assert len(images.train) + len(images.held_out) == 8  # six of the eight are copies of those in a/b


def test_a_split_stays_when_images_are_added_or_renamed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", 20)
    before = load_folder_images(folder, 48)
    assert 3 <= len(before.held_out) <= 9  # 30 % of 20, give or take
    for path in sorted(folder.iterdir()):
        path.rename(folder / f"renamed-{path.name}")
    renamed = load_folder_images(folder, 48)
    assert renamed.fingerprints() == before.fingerprints()
    for count in (4, 16):
        assert torch.equal(renamed.held_out_crops(count), before.held_out_crops(count))
    for i in range(20, 30):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    after = load_folder_images(folder, 48)
    for one, other in ((before.train, after.train), (before.held_out, after.held_out)):
        assert {image.sha256 for image in one} < {image.sha256 for image in other}
    assert after.fingerprints().keys() == {"data/train", "data/held_out"}
    assert after.fingerprints()["data/train"] != before.fingerprints()["data/train"]


def test_the_parts_may_be_given(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 3)
    with pytest.raises(UserError, match="held_out: no image that can be used"):
        (tmp_path / "held_out").mkdir()
        load_folder_images(tmp_path, 48)
    Image.fromarray(picture(50)).save(tmp_path / "held_out" / "x.png")
    images = load_folder_images(tmp_path, 48)
    assert (len(images.train), len(images.held_out)) == (3, 1)
    Image.fromarray(picture(1)).save(tmp_path / "held_out" / "same.png")
    with pytest.raises(UserError, match="is held out, and trained on as"):
        load_folder_images(tmp_path, 48)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"{count} different images that can be used; at least 2"):
        load_folder_images(folder_of(tmp_path, count), 48)


def test_both_parts_have_an_image_however_few_there_are(tmp_path: Path) -> None:
    for start in range(8):
        folder = tmp_path / str(start)
        folder.mkdir()
        for i in (start, start + 100):
            Image.fromarray(picture(i)).save(folder / f"{i}.png")
        images = load_folder_images(folder, 48)
        assert len(images.train) == len(images.held_out) == 1


def test_crops_depend_on_the_generator_alone_and_prefer_what_is_not_black(tmp_path: Path) -> None:
    folder = tmp_path / "framed"
    folder.mkdir()
    for i in range(6):
        framed = np.zeros((200, 200, 3), np.uint8)
        framed[40:160, 40:160] = picture(i, 120, 120)
        Image.fromarray(framed).save(folder / f"{i}.png")
    images = load_folder_images(folder, 32)
    one, other = (images.train_crops(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (64, 3, 32, 32) and one.max() <= 1
    assert not torch.equal(one, images.train_crops(64, torch.Generator().manual_seed(4)))
    black = (one.amax(dim=1) < 0.06).float().mean().item()
    assert black < 0.25  # 64 % of the pixels of these images are black


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    images = load_folder_images(folder_of(tmp_path), 48)
    cache = PixelCache(limit=3 * 64 * 80 * 3)
    for file in (*images.train, *images.held_out):
        pixels = cache.pixels(file, None)
        assert np.array_equal(pixels, read(Path(file.path))) and cache.bytes <= cache.limit
    assert len(cache.kept) == 3 and cache.bytes == sum(kept.nbytes for kept in cache.kept.values())
    file = images.train[0]
    Path(file.path).write_bytes(Path(images.train[1].path).read_bytes())
    with pytest.raises(UserError, match="has changed while it was in use"):
        PixelCache(limit=0).pixels(file, None)


def test_the_bundled_task_on_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x")

    def made(seed: int = 0, **config: object) -> FundusSR:
        task = FundusSR()
        task.setup({"data": str(folder), "crop": 32, "batch_size": 4, **config}, seed, "cpu")
        return task

    task = made()
    assert torch.equal(task.training_images(3), made().training_images(3))
    assert not torch.equal(task.training_images(3), made(seed=1).training_images(3))
    assert not torch.equal(task.training_images(3), task.training_images(4))
    assert float(task.step()["loss_flow"]) > 0 and task.sample().images.shape == (32, 3, 32, 32)
    assert set(task.fingerprints()) == {"data/train", "data/held_out", "data/evaluation"}
    assert task.effective()["image"] is None and task.left_out() == {}
    found, of_images = task.evaluate(), task.per_image()
    assert isinstance(task.images, FolderImages)
    assert {len(values) for values in of_images.values()} == {len(task.images.held_out)}
    assert {name: fmean(values) for name, values in of_images.items()} == pytest.approx(
        {name: found[name] for name in ("ssim", "psnr")}, rel=0.01
    )
    for config, words in (
        ({"image": "retina"}, "give one of them"),
        ({"data": str(tmp_path / "nowhere")}, "no such folder"),
        ({"data": str(tmp_path / "x" / "00.png")}, "not a folder"),
        ({"data": 3}, "data must be a folder"),
        ({"data_side": 0}, "data_side must be an integer >= 1"),
        ({"data_errors": "ignore"}, "data_errors 'ignore'; valid: skip, refuse"),
    ):
        with pytest.raises(UserError, match=words):
            made(**config)


def test_paths_are_relative_to_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study").mkdir()
    file = tmp_path / "study" / "s.yaml"
    file.write_text("task_config: {data: images, weights: ../w, vae: ~/vae, preset: sgd}\nspace: wide\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of")
    config = load_study(file).task_config
    assert config["data"] == str(tmp_path / "study" / "images")
    assert (config["weights"], config["vae"], config["preset"]) == (str(tmp_path / "w"), "/home/of/vae", "sgd")
    file.write_text("task: own:Task\ntask_config: {data: ./images, name: images}\nspace: wide\n")
    assert load_study(file).task_config == {"steps": 200, "data": str(tmp_path / "study" / "images"), "name": "images"}
    assert load_study({"task_config": {"data": "images"}, "space": "wide"}).task_config["data"] == str(tmp_path / "images")
