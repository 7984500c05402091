"""Several plain PyTorch trainings in one program, which knows nothing of an observer. Each prints its losses with all digits."""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_

OPTIMIZERS = ("SGD", "AdamW", "Adafactor", "RMSprop", "NAdam", "Adagrad", "Adadelta", "RAdam", "ASGD", "Rprop", "Adamax")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


def train(name, optimizer="AdamW", lr=0.01, clip=1.0, accumulate=1, scaled=False, steps=6):
    torch.manual_seed(0)
    net = Net()
    adam = getattr(torch.optim, optimizer)(net.parameters(), lr=lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        adam.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            x = torch.randn(32, 8, generator=draw)
            loss = ((net(x) - x.sum(1, keepdim=True)) ** 2).mean() / accumulate
            if scaled and step == 2:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            total += loss.item()
        if scaled:
            scaler.unscale_(adam)
        norm = clip_grad_norm_((p for p in net.parameters()), clip) if clip else torch.tensor(-1.0)
        scaler.step(adam)
        scaler.update()
        print(f"{name} {step}: loss {total!r} norm {norm.item()!r}", flush=True)


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["kinds", "optimizers"])
what = parser.parse_args().what
if what == "kinds":
    train("plain")
    train("accumulated", accumulate=3)
    train("scaled", scaled=True)
    train("loose", optimizer="SGD", clip=1e9)
    train("unclipped", optimizer="SGD", clip=None)
else:
    train("still", optimizer="SGD", lr=0.0)  # the norms of the untouched weights
    for kind in OPTIMIZERS:
        train(kind, optimizer=kind, steps=3)
