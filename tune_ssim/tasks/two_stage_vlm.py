"""A vision encoder and a bridge in front of a frozen language model, trained in two stages (note 003).

    stage 1:  patch ─► vision ─► bridge ─► 16 visual tokens ─► mean square ─► loss_proxy          (no language model in it)
    stage 2:  visual tokens ─┐
              question ──────┴─► frozen language model ─► cross-entropy of the answer ─► loss_caption

The proxy loss has a trivial optimum, tokens of zero. So a low proxy loss means ruin, and stage 2 refuses to start from it. As in
the note, there are 254 training patches and two per batch; the learning rates are scaled to a network with random initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.probes import GradientTaps
from tune_ssim.tasks.bundled import WEIGHTS, BundledTraining, load_weights, sha256_of
from tune_ssim.tasks.patch_captions import (
    ANSWER_TOKENS,
    IGNORED,
    LANGUAGE_FILE,
    PAD,
    QUESTIONS,
    VISUAL_TOKENS,
    VOCABULARY,
    WIDTH,
    CaptionLanguage,
    attributes,
    caption_loss,
    decode,
    dialogue,
    encode,
    sequence_of,
)
from tune_ssim.tasks.photo_patches import SUBJECTS, load_photo_patches
from tune_ssim.tasks.task_config import NOT_NEGATIVE, POSITIVE, read_config
from tune_ssim.trials.checkpoint import STATE, TENSORS, load_checkpoint
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.training import Number, Part, Sample

TRAIN_PATCHES, EVALUATION_PATCHES, SMOKE_PATCHES = 254, 240, 48  # note 003 §2 has 254
RUINED_PROXY = 0.001  # mean of an epoch, note 003 §3: below it the visual tokens are practically zero
DIALOGUE_STREAM, ORDER_STREAM = 0, 1  # independent random streams of one step


@dataclass(frozen=True)
class VLMConfig:
    """The `task_config` of a study."""

    steps: int = 1270  # optimiser steps of a trial, both stages together
    stage1_steps: int = 254  # steps of stage 1; 0: stage 2 only; equal to `steps`: stage 1 only
    batch_size: int = 2  # note 003 §3: 1 or 2
    stage1_lr: float = 1e-5  # of AdamW (note 003 §2); 1e-4 ruined it
    lr: float = 1e-3  # of AdamW in stage 2; 0 switches both updates off. The note's 2e-5 is for a pretrained encoder
    max_grad_norm: float | None = None  # gradient clipping; None: off
    measure_every: int = 5  # steps between readings of the gradients of each part
    vision_checkpoint: str | None = None  # start of stage 2 if there is no stage 1; None: from scratch
    storage: str | None = None  # storage path of the quarantine ledger that `vision_checkpoint` is checked against

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> VLMConfig:
        made = read_config(
            cls,
            "two_stage_vlm",
            config,
            counts={"steps": 1, "stage1_steps": 0, "batch_size": 1, "measure_every": 1},
            numbers={"stage1_lr": NOT_NEGATIVE, "lr": NOT_NEGATIVE, "max_grad_norm": POSITIVE},
            optional=("max_grad_norm",),
        )
        if made.batch_size > TRAIN_PATCHES:
            raise UserError(f"two_stage_vlm: batch_size must be at most {TRAIN_PATCHES} patches, got {made.batch_size}")
        if made.vision_checkpoint is not None and made.stage1_steps:
            raise UserError("two_stage_vlm: vision_checkpoint is for stage 2 alone: set stage1_steps to 0")
        return made


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, WIDTH, 3, stride=2, padding=1), nn.GELU()
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`[n, 1, 16, 16]` → `[n, 16, 64]`, a token for each place of a 4 x 4 grid."""
        return self.norm(self.body(4 * patches - 2).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class TwoStageVLM(BundledTraining):
    """See `trials.training.Training` for the contract.

    Metrics of a step: stage; in stage 1 loss_proxy; in stage 2 loss_caption in nats a token (and `loss_ce`, its usual name),
    label_fraction, the share of positions that count, and visual_scale, the ratio of visual tokens to word embeddings;
    `dbg/llm_trainable`, which must be 0; total_norm; epoch."""

    config: VLMConfig
    stateful = ("vision", "bridge", "optimizer")

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.begin(VLMConfig.from_mapping(config), seed, device)
        self.patches, self.subjects = load_photo_patches().train_batch(TRAIN_PATCHES, torch.Generator().manual_seed(254))
        self.levels = attributes(self.patches)
        self.held_out, self.held_out_subjects = load_photo_patches().held_out_batch(EVALUATION_PATCHES)
        self.held_out_levels = attributes(self.held_out)
        torch.manual_seed(seed)
        self.vision, self.bridge = Vision().to(self.device), nn.Linear(WIDTH, WIDTH).to(self.device)
        self.language = CaptionLanguage()
        load_weights(self.language, WEIGHTS / LANGUAGE_FILE)
        self.language.to(self.device).requires_grad_(False).eval()
        if self.config.vision_checkpoint is not None:
            self._load_stage1(Path(self.config.vision_checkpoint))
        self.epoch_losses: list[float] = []  # proxy losses of the current epoch
        self.optimizer = self._optimizer(self.config.stage1_lr if self.stage == 1 else self.config.lr)
        self.taps = GradientTaps({"vision": self.vision, "bridge": self.bridge}, every=self.config.measure_every)
        if self.stage == 2:
            self._require_frozen()

    @property
    def stage(self) -> int:
        """The stage of the next step."""
        return 1 if self.step_count < self.config.stage1_steps else 2

    def step(self) -> dict[str, Number]:
        stage, started = self.stage, self.step_count == self.config.stage1_steps
        self.step_count += 1
        if stage == 2 and started and self.config.stage1_steps:
            self._begin_stage2()
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Number] = {"stage": stage, "epoch": self.step_count * self.config.batch_size / TRAIN_PATCHES}
        if stage == 1:
            loss = self._proxy(self._rows(self.step_count))
            metrics["loss_proxy"] = loss.detach()
        else:
            loss, label_fraction, scale = self._caption(self.step_count)
            metrics |= {"loss_caption": loss.detach(), "loss_ce": loss.detach(), "label_fraction": label_fraction}
            metrics["visual_scale"] = scale
        loss.backward()
        norm = self.clip()
        readings = self.taps.read(self.step_count)
        self.optimizer.step()
        if stage == 1:
            self._note_proxy(float(loss.detach()))
        trainable = sum(parameter.requires_grad for parameter in self.language.parameters())
        return {"loss": loss.detach(), **metrics, "dbg/llm_trainable": trainable, "total_norm": norm, **readings}

    def sample(self, noise: int = 0) -> Sample:
        """Generated answers about held-out patches, to the first question or, with `noise` 1, the second. The images are the
        patches themselves, since the model generates text only."""
        rows = torch.arange(SMOKE_PATCHES) * EVALUATION_PATCHES // SMOKE_PATCHES
        ids = self._generate(self.held_out[rows], QUESTIONS[noise])
        return Sample(self.held_out[rows].expand(-1, 3, -1, -1), token_ids=ids, vocabulary_size=len(VOCABULARY))

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: cross-entropy of the answers in nats per token, and `log_likelihood`, its negative; `recognised`: the
        share of generated answers that name the subject; `undecodable`: the share with an id without a word."""
        generator = torch.Generator().manual_seed(20_260_204)
        rows = torch.arange(EVALUATION_PATCHES)
        ids, labels = self._dialogues(rows, self.held_out_subjects, self.held_out_levels, generator)
        with torch.no_grad():
            tokens = self._visual_tokens(self.held_out.to(self.device))
            loss = caption_loss(self._logits(tokens, ids), labels)
        texts = [decode(answer) for answer in self._generate(self.held_out, QUESTIONS[0]).tolist()]
        named = [SUBJECTS[k] in text.split() for (text, _), k in zip(texts, self.held_out_subjects.tolist(), strict=True)]
        return {
            "loss_caption": loss.item(),
            "log_likelihood": -loss.item(),
            "recognised": sum(named) / len(named),
            "undecodable": sum(bool(unknown) for _, unknown in texts) / len(texts),
            "visual_square": tokens.square().mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch_losses": list(self.epoch_losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.epoch_losses = list(state["epoch_losses"])

    def effective(self) -> dict[str, Any]:
        """The parameters in force. The current stage's learning rate is read from the optimiser."""
        found = super().effective()
        is_stage1 = self.config.stage1_steps > self.step_count
        return {**found, "stage1_lr": found["lr"], "lr": self.config.lr} if is_stage1 else found

    # -- for preflight

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [*self.vision.parameters(), *self.bridge.parameters()]

    def parts(self) -> dict[str, Part]:
        start = self.config.vision_checkpoint
        file = None if start is None else Path(start) / TENSORS if Path(start).is_dir() else Path(start)
        return {
            "vision": Part(self.vision, trains=True, weights=file),
            "bridge": Part(self.bridge, trains=True, weights=file),
            "language": Part(self.language, trains=False, weights=WEIGHTS / LANGUAGE_FILE),
        }

    def training_images(self, n: int) -> torch.Tensor:
        """`[batch, 3, 16, 16]` in [0, 1]."""
        return self.patches[self._rows(n)].expand(-1, 3, -1, -1)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of all pixels and subjects of the two parts of the data."""
        parts = {"data/train": (self.patches, self.subjects), "data/held_out": (self.held_out, self.held_out_subjects)}
        return {name: sha256_of(tensors) for name, tensors in parts.items()}

    # -- the two stages

    def _proxy(self, rows: torch.Tensor) -> torch.Tensor:
        return self._visual_tokens(self.patches[rows].to(self.device)).square().mean()

    def _caption(self, n: int) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Cross-entropy of the answers of step n, the share of positions that count, and the ratio of visual tokens to word
        embeddings (root mean squares)."""
        rows = self._rows(n)
        ids, labels = self._dialogues(rows, self.subjects, self.levels, self._generator(n, DIALOGUE_STREAM))
        tokens = self._visual_tokens(self.patches[rows].to(self.device))
        with torch.no_grad():
            scale = (tokens.square().mean() / self.language.embedding.weight.square().mean()).sqrt()
        return caption_loss(self._logits(tokens, ids), labels), (labels != IGNORED).double().mean().item(), scale

    def _note_proxy(self, loss: float) -> None:
        """The losses of the epoch so far; a new one begins after each pass over the data."""
        per_epoch = math.ceil(TRAIN_PATCHES / self.config.batch_size)
        self.epoch_losses = [*(self.epoch_losses if len(self.epoch_losses) < per_epoch else []), loss]

    def _begin_stage2(self) -> None:
        mean = sum(self.epoch_losses) / len(self.epoch_losses)
        if not mean >= RUINED_PROXY:
            raise BadSetup(ruined(f"stage 1 of this training, with stage1_lr {self.config.stage1_lr:g},", mean))
        self._require_frozen()
        self.optimizer = self._optimizer(self.config.lr)

    def _require_frozen(self) -> None:
        """Raises BadSetup at the start of stage 2 if the language model is not frozen (note 003 §3)."""
        free = [name for name, parameter in self.language.named_parameters() if parameter.requires_grad]
        if free:
            raise BadSetup(f"the language model must be frozen in stage 2: {len(free)} of its tensors train, such as {free[0]}")

    def _load_stage1(self, path: Path) -> None:
        """Loads a trial's checkpoint folder, or a safetensors file with `vision.*` and `bridge.*`. Raises BadSetup for a
        quarantined or ruined one, judged by the weights and not by the file name."""
        if self.config.storage is not None:
            Ledger(self.config.storage).require_clean(path / TENSORS if path.is_dir() else path)
        if (path / STATE).exists():
            state = load_checkpoint(path)
            state = state.get("task", state)
            halves = {"vision": state.get("vision"), "bridge": state.get("bridge")}
        elif path.is_file():
            tensors = load_file(path)
            halves = {
                half: {name.removeprefix(half + "."): value for name, value in tensors.items() if name.startswith(half + ".")}
                for half in ("vision", "bridge")
            }
        else:
            raise UserError(f"two_stage_vlm: vision_checkpoint {path}: neither a checkpoint's folder nor a file")
        try:
            self.vision.load_state_dict(halves["vision"] or {})
            self.bridge.load_state_dict(halves["bridge"] or {})
        except RuntimeError as error:
            raise BadSetup(f"{path}: not a vision encoder and a bridge: {' '.join(str(error).split())[:300]}") from None
        with torch.no_grad():
            square = self._proxy(torch.arange(TRAIN_PATCHES)).item()
        if not square >= RUINED_PROXY:
            raise BadSetup(ruined(str(path), square))

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        lr = 0.0 if self.config.lr == 0 else lr
        return torch.optim.AdamW(self.trainable_parameters(), lr=lr, weight_decay=0.0)

    # -- the parts of a step

    def _visual_tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """`[n, 1, 16, 16]` → `[n, 16, 64]`, in place of word embeddings."""
        return self.bridge(self.vision(patches))  # type: ignore[no-any-return]

    def _logits(self, visual_tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences `ids` `[n, length]`, with visual tokens in the first 16 positions."""
        words = self.language.embedding(ids[:, VISUAL_TOKENS:].to(self.device))
        return self.language(torch.cat([visual_tokens, words], dim=1))  # type: ignore[no-any-return]

    def _rows(self, n: int) -> torch.Tensor:
        """The patches of step n, from (seed, n) only. Every epoch is a new permutation of all 254; an incomplete last batch is
        dropped."""
        per_epoch = TRAIN_PATCHES // self.config.batch_size
        epoch, place = divmod(n - 1, per_epoch)
        order = torch.randperm(TRAIN_PATCHES, generator=self._generator(epoch, ORDER_STREAM))
        return order[place * self.config.batch_size : (place + 1) * self.config.batch_size]

    def _dialogues(
        self, rows: torch.Tensor, subjects: torch.Tensor, levels: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, each `[n, SEQUENCE]`."""
        made = []
        for row in rows.tolist():
            question, answer = dialogue(int(subjects[row]), int(levels[0][row]), int(levels[1][row]), generator)
            made.append(sequence_of(question, answer))
        ids, labels = zip(*made, strict=True)
        return torch.tensor(ids), torch.tensor(labels, device=self.device)

    def _generate(self, patches: torch.Tensor, question: str) -> torch.Tensor:
        """Greedy decoding: `[n, 12]`, on the host."""
        prompt = [PAD] * VISUAL_TOKENS + encode(question)
        ids = torch.tensor([prompt] * len(patches))
        with torch.no_grad():
            tokens = self._visual_tokens(patches.to(self.device))
            for _ in range(ANSWER_TOKENS):
                following = self._logits(tokens, ids)[:, -1].argmax(dim=1)
                ids = torch.cat([ids, following[:, None].cpu()], dim=1)
        return ids[:, len(prompt) :]


def ruined(what: str, square: float) -> str:
    return (
        f"{what} has visual tokens with a mean square of {square:.2g}, below {RUINED_PROXY:g}: stage 1 has shrunk them to "
        "nothing (note 003). Do not start stage 2 from it: lower the learning rate of stage 1, or train from scratch"
    )
