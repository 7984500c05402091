"""Questions and answers about the bundled patches, and a small language model that can answer from a description in words.

An answer states the patch's real subject and its measured brightness and contrast. There are many correct wordings of an answer,
drawn anew for every step, so the cross-entropy cannot reach zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from tune_ssim.tasks.photo_patches import SUBJECTS

LANGUAGE_FILE = "caption_language.safetensors"
BRIGHTNESS = (("dark", "dim", "shadowy"), ("grey", "medium", "even"), ("bright", "pale", "light"))
CONTRAST = (("flat", "plain", "smooth"), ("soft", "gentle", "mild"), ("rough", "busy", "sharp"))
MEAN_BOUNDS, STD_BOUNDS = (0.45, 0.65), (0.1, 0.22)  # thirds of the training patches
QUESTIONS = ("what does the picture show ?", "describe the patch .", "what is this ?", "caption :")
ANSWERS = (
    "a {b} {c} patch of {s} .",
    "this is {s} , {b} and {c} .",
    "the picture shows {c} {b} {s} .",
    "{s} , seen {b} and {c} .",
    "here we see a {c} and {b} piece of {s} .",
    "it looks like {b} {s} with a {c} surface .",
)
FILLERS = ("the", "of", "a", "and", ",", "it", "is", "we")  # other words in a description
PAD, END, IMAGE = 0, 1, 2  # token ids: padding, end of the answer, placeholder of a visual token
WORDS = (
    "<pad>", "<end>", "<image>",
    *sorted({word for text in (*QUESTIONS, *ANSWERS) for word in text.split() if "{" not in word} | set(FILLERS)),
    *(word for words in (*BRIGHTNESS, *CONTRAST) for word in words), *SUBJECTS,
)  # fmt: skip
VOCABULARY = tuple(dict.fromkeys(WORDS))
EMBEDDED = 96  # rows of the embedding, padded to a round number as in real models, so some ids have no word
IGNORED = -100  # label of a position that takes no part in the loss (PyTorch's and Hugging Face's number)
VISUAL_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 16, 6, 12
SEQUENCE = VISUAL_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS
WIDTH, HEADS, LAYERS = 64, 4, 2


def attributes(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness and contrast of `[n, 1, 16, 16]` in [0, 1]: classes 0, 1, 2, each `[n]`."""
    mean, std = patches.mean(dim=(1, 2, 3)), patches.std(dim=(1, 2, 3))
    return torch.bucketize(mean, torch.tensor(MEAN_BOUNDS)), torch.bucketize(std, torch.tensor(STD_BOUNDS))


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def decode(ids: Sequence[int]) -> tuple[str, list[int]]:
    """The words up to the end, and the ids without a word (note 001: such an id decodes to None, and joining fails)."""
    found: list[str] = []
    unknown: list[int] = []
    for id in ids:
        if id == END:
            break
        if 0 <= id < len(VOCABULARY):
            found.append(VOCABULARY[id])
        else:
            unknown.append(id)
    return " ".join(found), unknown


def dialogue(subject: int, brightness: int, contrast: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """A question and one of its correct answers, ending in `END`, as token ids."""

    def one_of(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    words = {"s": SUBJECTS[subject], "b": one_of(BRIGHTNESS[brightness]), "c": one_of(CONTRAST[contrast])}
    return encode(one_of(QUESTIONS)), [*encode(one_of(ANSWERS).format(**words)), END]


def sequence_of(question: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one sample, both `SEQUENCE` long: visual tokens, question, answer, padding.

    Labels are IGNORED over the visual and question positions and the padding (note 003 §3); the label of a position is its
    own token, and the loss shifts them."""
    prompt = [IMAGE] * VISUAL_TOKENS + list(question)
    padding = SEQUENCE - len(prompt) - len(answer)
    labels = [IGNORED] * len(prompt) + list(answer) + [IGNORED] * padding
    return [*prompt, *answer, *[PAD] * padding], labels


class CaptionLanguage(nn.Module):
    """A causal transformer over `VOCABULARY`, with the output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(EMBEDDED, WIDTH)
        self.places = nn.Parameter(torch.zeros(SEQUENCE, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.3)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """`[n, length, 64]` → logits `[n, length, 96]`: of position i, what follows it."""
        length = embedded.shape[1]
        mask = torch.full((length, length), -torch.inf, device=embedded.device).triu(1)
        hidden = embedded + self.places[:length]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask)
        return self.norm(hidden) @ self.embedding.weight.T  # type: ignore[no-any-return]


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats per token, over the positions whose label is not IGNORED. Label i is predicted at position i − 1."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
