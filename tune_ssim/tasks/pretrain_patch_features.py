"""Trains the features of `flow_dino_kl` from scratch: `python -m tune_ssim.tasks.pretrain_patch_features --out DIR`.

Self-distillation without labels (DINO, Caron et al. 2021) on the training rows of the bundled photographs: a student sees two
jittered crops of one place and predicts the output of its own moving average for the other crop. The average's outputs are centred
and sharpened, so that they do not become constant. Takes about two CPU minutes. It prints the share of held-out patches whose
nearest training patch has the same subject; labels are used for this number only.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from tune_ssim.tasks.patch_features import FEATURES, FEATURES_FILE, PatchFeatures
from tune_ssim.tasks.photo_patches import PATCH, PHOTOS, load_photo, load_photo_patches

STEPS, BATCH, LR = 2500, 64, 2e-3
PLACE = 24  # pixels: where both crops of 16 come from
PROTOTYPES = 96
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04  # Caron et al. 2021
CENTRE_MOMENTUM, AVERAGE_MOMENTUM = 0.9, 0.99


def crops(photos: list[torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two jittered crops of each of `BATCH` places: `[BATCH, 1, 16, 16]` twice."""
    one: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    for k in torch.randint(len(photos), (BATCH,), generator=generator).tolist():
        photo = photos[k]
        row, column, *shifts = torch.rand(6, generator=generator).tolist()
        row, column = int(row * (photo.shape[0] - PLACE)), int(column * (photo.shape[1] - PLACE))
        for made, down, right in ((one, *shifts[:2]), (other, *shifts[2:])):
            r, c = row + int(down * (PLACE - PATCH + 1)), column + int(right * (PLACE - PATCH + 1))
            made.append(photo[r : r + PATCH, c : c + PATCH])
    return _jittered(torch.stack(one)[:, None], generator), _jittered(torch.stack(other)[:, None], generator)


def _jittered(patches: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    contrast = 0.7 + 0.6 * torch.rand(len(patches), 1, 1, 1, generator=generator)
    brightness = 0.3 * (torch.rand(len(patches), 1, 1, 1, generator=generator) - 0.5)
    flip = torch.rand(len(patches), generator=generator) < 0.5
    patches = torch.where(flip[:, None, None, None], patches.flip(-1), patches)
    return ((patches - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def train_features(steps: int = STEPS, seed: int = 0) -> PatchFeatures:
    torch.manual_seed(seed)
    photos = [load_photo(name)[0] for name in PHOTOS]
    body, head = PatchFeatures(), nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, PROTOTYPES, bias=False))
    student = nn.Sequential(body, head)
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = torch.zeros(PROTOTYPES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        views = crops(photos, torch.Generator().manual_seed(seed * 1_000_003 + step))
        with torch.no_grad():
            targets = [teacher(view) for view in views]
            sharp = [((target - centre) / TEACHER_TEMPERATURE).softmax(dim=1) for target in targets]
            centre = CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * torch.cat(targets).mean(dim=0)
        found = [student(view) / STUDENT_TEMPERATURE for view in views]
        loss = functional.cross_entropy(found[0], sharp[1]) + functional.cross_entropy(found[1], sharp[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(parameter, 1 - AVERAGE_MOMENTUM)
        if step % 250 == 0 or step == steps - 1:
            entropy = -(sharp[0].mean(dim=0) * sharp[0].mean(dim=0).clamp(min=1e-9).log()).sum()
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "entropy": round(entropy.item(), 3)}), flush=True)
    made = teacher[0]
    assert isinstance(made, PatchFeatures)
    return made.requires_grad_(False)


def nearest_neighbour_accuracy(features: PatchFeatures) -> float:
    """Share of held-out patches whose nearest training patch, by cosine, shows the same subject."""
    patches = load_photo_patches()
    known, subjects = patches.train_batch(3000, torch.Generator().manual_seed(0))
    asked, truth = patches.held_out_batch(480)
    one, other = (functional.normalize(features(x) - features(known).mean(dim=0), dim=1) for x in (asked, known))
    return (subjects[(one @ other.T).argmax(dim=1)] == truth).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {FEATURES_FILE}")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    features = train_features(arguments.steps)
    file = arguments.out / FEATURES_FILE
    save_file(features.state_dict(), file, metadata={"format": "pt", "made_by": "tune_ssim.tasks.pretrain_patch_features"})
    scores = {"trained": nearest_neighbour_accuracy(features), "untrained": nearest_neighbour_accuracy(PatchFeatures())}
    print(json.dumps({"nearest_neighbour_accuracy": scores}))
    print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")


if __name__ == "__main__":
    main()
