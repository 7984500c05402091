"""A character-level GPT in the manner of nanoGPT, on generated text: four layers, 128 wide, 16 sequences of 64."""

import argparse
import time

import torch
from torch.nn import functional

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps
WIDTH, LAYERS, CONTEXT, BATCH, VOCABULARY = 128, 4, 64, 16, 64


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.mlp = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.project = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, 4, -1).transpose(1, 2) for part in self.qkv(self.attend(x)).split(WIDTH, dim=2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(functional.gelu(self.up(self.mlp(x))))


class Gpt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        return self.head(self.blocks(self.tokens(ids) + self.places.weight))


torch.manual_seed(0)
model = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
text = torch.randint(VOCABULARY, (10_000,))
times = []
for step in range(steps):
    started = time.perf_counter()
    at = torch.randint(len(text) - CONTEXT - 1, (BATCH,))
    ids = torch.stack([text[i : i + CONTEXT + 1] for i in at])
    loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times.append(time.perf_counter() - started)
    print(f"iter {step}: loss {loss.item()!r}")
print("step_ms", 1000 * sorted(times)[len(times) // 2])
