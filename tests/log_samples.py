# ruff: noqa: E501  (lines as they are printed)
"""Small logs in the formats of public producers, with invented values, and what is read from them."""

from __future__ import annotations

import json
import math

NAN = math.nan
ESC = "\x1b"


def bar(desc: str, step: int, total: int, shown: str) -> str:
    """tqdm's, as it goes to a file."""
    return f"\r{desc}: {100 * step // total:3d}%|{'#' * (10 * step // total):<10}| {step}/{total} [00:0{step}<00:07,  1.48it/s, {shown}]"


def table(*rows: tuple[str, str]) -> str:
    return "\n".join(f"| {name:<10} | {value:<8} |" for name, value in rows) + "\n" + "-" * 26 + "\n"


# Producer: (the file's name, the log, step and values that are read, NaN included).
PRODUCERS: dict[str, tuple[str, str, list[tuple[int, dict[str, float]]]]] = {
    "kohya": (
        "train.log",
        "running training\nepoch 1/4\n" + "".join(bar("steps", n, 8, f"avr_loss={0.2 / n:.3g}") for n in (1, 2, 3)),
        [(1, {"avr_loss": 0.2}), (2, {"avr_loss": 0.1}), (3, {"avr_loss": 0.0667})],
    ),
    "diffusers": (
        "train.log",
        "Steps:   0%|          | 0/9 [00:00<?, ?it/s]"
        + "".join(bar("Steps", n, 9, f"lr=1e-5, step_loss={loss}") for n, loss in ((1, 0.5), (2, 0.25), (2, NAN))),
        [(1, {"lr": 1e-5, "step_loss": 0.5}), (2, {"lr": 1e-5, "step_loss": NAN})],
    ),
    "lightning": (
        "out.log",
        "".join(
            bar(f"Epoch {epoch}", n, 4, f"v_num=3, train_loss={epoch + 1 / n}") for epoch in (0, 1) for n in (2, 4)
        ) + bar("Validation", 1, 2, "val_loss=0.5"),
        [(2, {"train_loss": 0.5}), (4, {"train_loss": 0.25}), (6, {"train_loss": 1.5}), (8, {"train_loss": 1.25})],
    ),
    "tqdm, one bar an epoch": (
        "out.log",
        "\n".join("".join(bar("train", n, 5, f"loss={epoch + n}") for n in (1, 3, 5)) for epoch in (0, 1)),
        [(1, {"loss": 1}), (3, {"loss": 3}), (5, {"loss": 5}), (7, {"loss": 2}), (9, {"loss": 4}), (11, {"loss": 6})],
    ),
    "tqdm without a total": (
        "out.log",
        "\r0it [00:00, ?it/s]\r5it [00:01,  4.98it/s, loss=0.5]\r9it [00:02,  4.98it/s, loss=nan]",
        [(5, {"loss": 0.5}), (9, {"loss": NAN})],
    ),
    "bars and lines": (
        "out.log",
        bar("it", 1, 9, "loss=9") + "\nstep 1 loss 0.5\n" + bar("it", 2, 9, "loss=9") + "\nstep 2 loss 0.25\n",
        [(1, {"loss": 0.5}), (2, {"loss": 0.25})],
    ),
    "epochs": (
        "out.txt",
        "Epoch [1/9], Train Loss: 0.5, Val Loss: 0.75\r\nEpoch [2/9], Train Loss: nan, Val Loss: 0.5\r\n",
        [(1, {"loss": 0.5, "val_loss": 0.75}), (2, {"loss": NAN, "val_loss": 0.5})],
    ),
    "epochs and steps": (
        "out.txt",
        "Epoch [1/2], Step [10/20], Loss: 4.0\nEpoch [1/2], Step [20/20], Loss: 3.0\nEpoch [2/2], Step [10/20], Loss: 2.0\n",
        [(10, {"loss": 4}), (20, {"loss": 3}), (30, {"loss": 2})],
    ),
    "one line an epoch with its last step": (
        "out.txt",
        "".join(f"epoch {n} step 100 loss {n}.5\n" for n in (1, 2, 3)),
        [(100, {"loss": 1.5}), (101, {"loss": 2.5}), (102, {"loss": 3.5})],
    ),
    "torchvision": (
        "out.txt",
        "Epoch: [0]  [ 0/30]  eta: 0:01:30  lr: 0.1  loss: 2.5 (2.5)  time: 3.0  data: 1.0  max mem: 900\n"
        "Epoch: [0]  [10/30]  eta: 0:00:30  lr: 0.1  loss: 1.5 (2.0)  time: 3.0  data: 1.0  max mem: 900\n"
        "Epoch: [1]  [ 0/30]  eta: 0:01:30  lr: 0.1  loss: nan (nan)  time: 3.0  data: 1.0  max mem: 900\n",
        [(0, {"lr": 0.1, "loss": 2.5}), (10, {"lr": 0.1, "loss": 1.5}), (20, {"lr": 0.1, "loss": NAN})],
    ),
    "ImageNet example": (
        "out.txt",
        "Epoch: [0][  1/9]\tTime  0.5 ( 0.6)\tLoss 6.9e+00 (7.0e+00)\tAcc@1   0.00 (  0.10)\n"
        "Epoch: [1][  1/9]\tTime  0.5 ( 0.6)\tLoss 5.9e+00 (6.0e+00)\tAcc@1   0.00 (  0.10)\n",
        [(1, {"loss": 6.9}), (2, {"loss": 5.9})],
    ),
    "timm": (
        "out.txt",
        "Train: 0 [   0/90 (  0%)]  Loss: 6.95 (6.95)  Time: 1.5s\nTrain: 0 [  50/90 ( 56%)]  Loss: 6.5 (6.7)  Time: 1.5s\n"
        "Train: 1 [   0/90 (  0%)]  Loss: 6.25 (6.25)  Time: 1.5s\n",
        [(0, {"loss": 6.95}), (50, {"loss": 6.5}), (100, {"loss": 6.25})],
    ),
    "PyTorch's MNIST example": (
        "out.txt",
        "Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.5\nTrain Epoch: 1 [640/60000 (1%)]\tLoss: 1.5\n\n"
        "Test set: Average loss: 0.0001, Accuracy: 9850/10000 (98%)\n\nTrain Epoch: 2 [0/60000 (0%)]\tLoss: nan\n",
        [(0, {"loss": 2.5}), (640, {"loss": 1.5}), (1280, {"loss": NAN})],
    ),
    "PyTorch's transfer learning tutorial": (
        "out.txt",
        "Epoch 0/24\n----------\ntrain Loss: 0.5 Acc: 0.8\nval Loss: 0.25 Acc: 0.9\n\n"
        "Epoch 1/24\n----------\ntrain Loss: 0.4 Acc: 0.8\nval Loss: nan Acc: 0.9\n",
        [(0, {"loss": 0.5, "acc": 0.8, "val_loss": 0.25, "val_acc": 0.9}), (1, {"loss": 0.4, "acc": 0.8, "val_loss": NAN, "val_acc": 0.9})],
    ),
    "MMCV": (
        "out.log",
        "2026-01-01 10:00:00,123 - mmseg - INFO - Epoch [1][50/90]\tlr: 1.0e-03, eta: 1:00:00, time: 0.5, loss: 0.9, grad_norm: 3.5\n"
        "2026-01-01 10:00:00,123 - mmseg - INFO - Epoch(val) [1][20]\tmIoU: 0.5\n"
        "2026-01-01 10:00:00,123 - mmseg - INFO - Epoch [2][50/90]\tlr: 1.0e-03, eta: 1:00:00, time: 0.5, loss: 0.7, grad_norm: 3.5\n",
        [(50, {"loss": 0.9, "grad_norm": 3.5}), (51, {"loss": 0.7, "grad_norm": 3.5})],
    ),
    "MMEngine": (
        "out.log",
        "train_cfg = dict(max_iters=900, type='IterBasedTrainLoop', iter=3, lr=1)\n"
        "2026/01/01 10:00:00 - mmengine - INFO - Iter(train) [ 100/900]  base_lr: 1.0e-03 eta: 1 day, 0:00:00  loss: 0.9\n"
        "2026/01/01 10:00:00 - mmengine - INFO - Iter(val) [10/50]    eta: 0:00:10  time: 0.2  loss: 5.0\n"
        "2026/01/01 10:00:00 - mmengine - INFO - Iter(train) [ 200/900]  base_lr: 1.0e-03 eta: 1 day, 0:00:00  loss: nan\n",
        [(100, {"base_lr": 0.001, "loss": 0.9}), (200, {"base_lr": 0.001, "loss": NAN})],
    ),
    "a counter in front": (
        "out.txt",
        "Epoch 1: val_loss improved from inf to 0.5, saving model to w.h5\n10/90 train_loss=0.5\n[20/90] train_loss=nan\n",
        [(10, {"train_loss": 0.5}), (20, {"train_loss": NAN})],
    ),
    "nothing but a loss": (
        "out.txt",
        "starting\nloss: 0.5\nloss: 0.25\nloss: nan\n",
        [(1, {"loss": 0.5}), (2, {"loss": 0.25}), (3, {"loss": NAN})],
    ),
    "nothing but a loss, often": (
        "out.txt",
        "".join(f"loss: {n}.5\n" for n in range(30)),
        [(n + 1, {"loss": n + 0.5}) for n in range(30)],
    ),
    "PyTorch-GAN": (
        "out.txt",
        "[Epoch 0/200] [Batch 0/938] [D loss: 0.7] [G loss: 0.8]\n[Epoch 0/200] [Batch 1/938] [D loss: 0.6] [G loss: nan]\n",
        [(0, {"d_loss": 0.7, "g_loss": 0.8}), (1, {"d_loss": 0.6, "g_loss": NAN})],
    ),
    "DCGAN": (
        "out.txt",
        "[0/5][0/9]\tLoss_D: 1.5\tLoss_G: 5.5\tD(x): 0.5\n[0/5][5/9]\tLoss_D: 1.4\tLoss_G: 5.4\tD(x): 0.5\n"
        "[1/5][0/9]\tLoss_D: 1.3\tLoss_G: 5.3\tD(x): 0.5\n",
        [(0, {"loss_d": 1.5, "loss_g": 5.5}), (5, {"loss_d": 1.4, "loss_g": 5.4}), (10, {"loss_d": 1.3, "loss_g": 5.3})],
    ),
    "CycleGAN": (
        "loss_log.txt",
        "(epoch: 1, iters: 100, time: 0.1, data: 0.2) loss_G: 0.5 D_A: 0.2 \n(epoch: 2, iters: 100, time: 0.1, data: 0.2) loss_G: 0.4 D_A: 0.2 \n",
        [(100, {"loss_g": 0.5, "d_a": 0.2}), (101, {"loss_g": 0.4, "d_a": 0.2})],
    ),
    "fairseq": (
        "out.log",
        "2026-01-01 | INFO | train_inner | epoch 001:     10 / 90 loss=9.5, ppl=700, num_updates=10, gnorm=2.5\n"
        "2026-01-01 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 4.5 | ppl 22 | num_updates 10\n"
        "2026-01-01 | INFO | train_inner | epoch 002:     10 / 90 loss=8.5, ppl=600, num_updates=100, gnorm=2.5\n",
        [(10, {"loss": 9.5, "ppl": 700, "gnorm": 2.5, "val_loss": 4.5, "val_ppl": 22}), (100, {"loss": 8.5, "ppl": 600, "gnorm": 2.5})],
    ),
    "nanoGPT": (
        "out.txt",
        "step 0: train loss 4.1, val loss 4.2\niter 0: loss 4.3, time 100.00ms, mfu -100.00%\nstep 250: train loss 2.1, val loss nan\n",
        [(0, {"loss": 4.1, "val_loss": 4.2}), (250, {"loss": 2.1, "val_loss": NAN})],
    ),
    "baselines' logger": (
        "log.txt",
        table(("grad_norm", "82"), ("loss", "1.5"), ("step", "1e+04")) + table(("grad_norm", "81"), ("loss", "nan"), ("step", "1e+04")),
        [(10000, {"grad_norm": 82, "loss": 1.5}), (10001, {"grad_norm": 81, "loss": NAN})],
    ),
    "Stable-Baselines3": (
        "log.txt",
        table(("time/", ""), ("   total_timesteps", "2048"), ("train/", ""), ("   loss", "0.5"))
        + table(("time/", ""), ("   total_timesteps", "4096"), ("train/", ""), ("   loss", "0.25")),
        [(2048, {"train/loss": 0.5}), (4096, {"train/loss": 0.25})],
    ),
    "LeRobot": (
        "out.log",
        "".join(
            f"INFO 2026-06-12 10:53:24 ot_train.py:357 step:{step} smpl:13K ep:40 epch:1.0 loss:{loss} grdn:2.5 lr:1.0e-05\n"
            for step, loss in (("600", 4.0), ("800", 3.0), ("1K", 2.0), ("1K", 1.5), ("2K", NAN))
        ),
        [(step, {"loss": loss, "grdn": 2.5}) for step, loss in ((600, 4.0), (800, 3.0), (1000, 2.0), (1200, 1.5), (2000, NAN))],
    ),
    "thousands": ("out.txt", "Step: 9,500 loss: 0.5\nStep: 10,000 loss: 0.25\n", [(9500, {"loss": 0.5}), (10000, {"loss": 0.25})]),
    "EDM": (
        "stats.jsonl",
        "".join(
            json.dumps({"Loss/loss": {"num": 64, "mean": loss, "std": 0.1}, "Progress/tick": {"num": 1, "mean": tick, "std": 0},
                        "Progress/kimg": {"num": 1, "mean": 50.2 * tick, "std": 0}}) + "\n"
            for tick, loss in ((0, 0.5), (1, 0.25), (2, NAN))
        ),
        [(0, {"Loss/loss": 0.5}), (50, {"Loss/loss": 0.25}), (100, {"Loss/loss": NAN})],
    ),
    "ms-swift": (
        "logging.jsonl",
        '{"loss": 0.9, "grad_norm": 1.5, "memory(GiB)": 3, "global_step/max_steps": "5/438", "percentage": "1.14%"}\n'
        '{"loss": NaN, "grad_norm": 1.5, "memory(GiB)": 3, "global_step/max_steps": "10/438", "percentage": "2.28%"}\n',
        [(5, {"loss": 0.9, "grad_norm": 1.5}), (10, {"loss": NAN, "grad_norm": 1.5})],
    ),
    "LLaMA-Factory": (
        "trainer_log.jsonl",
        '{"current_steps": 5, "total_steps": 90, "loss": 0.9}\n{"current_steps": 10, "total_steps": 90, "loss": NaN}\n',
        [(5, {"loss": 0.9}), (10, {"loss": NAN})],
    ),
    "fairseq's JSON": (
        "log.jsonl",
        '{"epoch": 1, "update": 0.2, "loss": "9.5", "num_updates": "100"}\n{"epoch": 1, "update": 0.4, "loss": "nan", "num_updates": "200"}\n',
        [(100, {"loss": 9.5}), (200, {"loss": NAN})],
    ),
    "rows of validation": (
        "log.jsonl",
        '{"mode": "train", "step": 1, "loss": 0.5}\n{"mode": "val", "step": 1, "loss": 7.0}\n{"mode": "train", "step": 2, "loss": 0.4}\n',
        [(1, {"loss": 0.5, "val_loss": 7.0}), (2, {"loss": 0.4})],
    ),
    "Keras": (
        "out.log",
        f"Epoch 1/3\n 1/48 [..........] - ETA: 3s - loss: 9.0\b\b\b48/48 [=====] - 3s 6ms/step - loss: 0.9 - val_loss: 0.8\n"
        f"Epoch 2/3\n{ESC}[1m48/48{ESC}[0m {ESC}[32m━━━━━{ESC}[0m{ESC}[37m{ESC}[0m {ESC}[1m0s{ESC}[0m 5ms/step - loss: nan - val_loss: 0.7\n",
        [(1, {"loss": 0.9, "val_loss": 0.8}), (2, {"loss": NAN, "val_loss": 0.7})],
    ),
    "Keras, CSVLogger": ("a.csv", "epoch,loss,val_loss\n0,0.5,0.6\n1,nan,0.5\n", [(0, {"loss": 0.5, "val_loss": 0.6}), (1, {"loss": NAN, "val_loss": 0.5})]),
    "W&B, exported": (
        "wandb_export_2026.csv",
        '"Step","run-12 - train/loss","run-12 - train/loss__MIN","run-12 - train/loss__MAX"\n"0","0.9","0.9","0.9"\n"10","NaN","0.8","0.8"\n',
        [(0, {"train/loss": 0.9}), (10, {"train/loss": NAN})],
    ),
    "TensorBoard, exported": (
        "run-train-tag-train_loss.csv",
        "Wall time,Step,Value\n1700000000.5,0,0.9\n1700000001.5,10,nan\n",
        [(0, {"train_loss": 0.9}), (10, {"train_loss": NAN})],
    ),
    "TensorBoard, exported as JSON": ("a.json", "[[1700000000.5, 0, 0.9], [1700000001.5, 10, NaN]]", [(0, {"loss": 0.9}), (10, {"loss": NAN})]),
    "colours and a logger": (
        "out.log",
        f"{ESC}[32m2026-01-01 10:00:00.123{ESC}[0m | {ESC}[1mINFO    {ESC}[0m | train:main:42 - step 10/90 loss=0.5 lr=1e-4\r\n"
        f"{ESC}[32m2026-01-01 10:00:01.123{ESC}[0m | {ESC}[1mINFO    {ESC}[0m | train:main:42 - step 20/90 loss=nan lr=1e-4\r\n",
        [(10, {"loss": 0.5, "lr": 1e-4}), (20, {"loss": NAN, "lr": 1e-4})],
    ),
}  # fmt: skip
