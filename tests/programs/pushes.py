"""A training in plain Python, with an auxiliary loss whose gradient is known: gradient = main + weight · scale · aux(max_t).

It prints one line a step. --defect breaks it in one way, without an error.
"""

import argparse
import random

SIZE = 40
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--ssim_loss_weight", type=float, default=0.0)
parser.add_argument("--ssim_loss_max_t", type=float, default=1.0)
parser.add_argument("--ssim_grad_scale", type=float, default=1.0)
parser.add_argument("--pixel_loss_weight", type=float, default=0.0)
parser.add_argument("--momentum", type=float, default=0.0)
parser.add_argument("--digits", type=int, default=8)
parser.add_argument("--defect", default="")
args = parser.parse_args()
print("arguments:", ", ".join(f"{name}={value}" for name, value in vars(args).items() if name != "digits"))

weights, velocity = [1.0] * SIZE, [0.0] * SIZE
for step in range(1, args.steps + 1):
    seed = None if args.defect == "unseeded" else 0 if args.defect == "seed ignored" else args.seed
    draw = random.Random() if seed is None else random.Random(f"{seed} {0 if args.defect == 'same batch' else step}")
    target = [draw.gauss(0, 1) for _ in weights]
    ts = [draw.random() for _ in range(4)]
    main = [w - x for w, x in zip(weights, target, strict=True)]
    aux, pixel = [0.0] * SIZE, [0.0] * SIZE
    max_t = 1.0 if args.defect == "gate ignored" else args.ssim_loss_max_t
    for t in ts:
        image = [draw.gauss(0, 0.05) for _ in weights]
        if t <= max_t:
            aux = [a + w * x for a, w, x in zip(aux, weights, image, strict=True)]
        if t <= 0.3:
            pixel = [p + w * x * x for p, w, x in zip(pixel, weights, image, strict=True)]
    weight = 0.0 if args.defect == "weight dropped" else args.ssim_loss_weight
    scale = 1.0 if args.defect == "scale ignored" else args.ssim_grad_scale
    gradient = [m + weight * scale * a + args.pixel_loss_weight * p for m, a, p in zip(main, aux, pixel, strict=True)]
    norm = sum(g * g for g in gradient) ** 0.5
    loss = sum(m * m for m in main) / 2
    lr = 0.01 if args.defect == "lr ignored" else -args.lr if args.defect == "climbs" else args.lr
    momentum = 0.0 if args.defect == "momentum ignored" else args.momentum
    velocity = [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
    weights = [w - lr * v for w, v in zip(weights, velocity, strict=True)]
    print(f"step {step}: loss {loss:.{args.digits}g} total_norm {norm:.{args.digits}g}", flush=True)
