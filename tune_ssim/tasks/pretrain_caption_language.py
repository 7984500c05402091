"""Trains the language model of `two_stage_vlm` from scratch: `python -m tune_ssim.tasks.pretrain_caption_language --out DIR`.

It learns to answer the questions of `patch_captions` from a description in words: the three relevant words, mixed with
fillers, in place of the visual tokens of a vision-language model. It never sees a patch. Takes about a CPU minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tune_ssim.tasks.patch_captions import (
    BRIGHTNESS,
    CONTRAST,
    FILLERS,
    LANGUAGE_FILE,
    VISUAL_TOKENS,
    CaptionLanguage,
    caption_loss,
    dialogue,
    encode,
    sequence_of,
)
from tune_ssim.tasks.photo_patches import SUBJECTS

STEPS, BATCH, LR = 1000, 32, 3e-3


def described(generator: torch.Generator) -> tuple[list[int], list[int]]:
    """One sample: a description in the place of the visual tokens, a question, an answer."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    subject, brightness, contrast = draw(len(SUBJECTS)), draw(3), draw(3)
    ids, labels = sequence_of(*dialogue(subject, brightness, contrast, generator))
    description = [encode(FILLERS[draw(len(FILLERS))])[0] for _ in range(VISUAL_TOKENS)]
    places = torch.randperm(VISUAL_TOKENS, generator=generator).tolist()
    for index, place in enumerate(places[: 3 + draw(VISUAL_TOKENS - 3)]):  # each of the three at least once
        words = (SUBJECTS[subject], BRIGHTNESS[brightness][draw(3)], CONTRAST[contrast][draw(3)])
        description[place] = encode(words[index % 3])[0]
    return [*description, *ids[VISUAL_TOKENS:]], labels


def train_language(steps: int = STEPS, seed: int = 0) -> CaptionLanguage:
    torch.manual_seed(seed)
    model = CaptionLanguage()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        ids, labels = zip(*(described(generator) for _ in range(BATCH)), strict=True)
        loss = caption_loss(model(model.embedding(torch.tensor(ids))), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(json.dumps({"step": step, "loss": round(loss.item(), 4)}), flush=True)
    return model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {LANGUAGE_FILE}")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / LANGUAGE_FILE
    model = train_language(arguments.steps)
    save_file(model.state_dict(), file, metadata={"format": "pt", "made_by": "tune_ssim.tasks.pretrain_caption_language"})
    print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")


if __name__ == "__main__":
    main()
