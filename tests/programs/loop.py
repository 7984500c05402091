"""A plain PyTorch loop that knows nothing of an observer. Prints every loss with all digits; flags choose how it trains."""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", choices=["", "ddp", "fsdp2", "fsdp1"], default="")
parser.add_argument("--load", default="")
parser.add_argument("--load_ema", default="")
parser.add_argument("--strip", default="", help="a key that is lost on the way")
parser.add_argument("--log", choices=["", "tensorboard", "mlflow", "wandb"], default="")
parser.add_argument("--folder", default="")
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


rank, world = 0, 1
if args.ranks == "fsdp1":  # over gloo it aborts in a CPU build; one process of two whose collectives do nothing
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
elif args.ranks:
    torch.distributed.init_process_group("gloo")
if args.ranks:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
net, ema = Net(), Net().requires_grad_(False)
for path, module in ((args.load, net), (args.load_ema, ema)):
    if path:
        weights = (
            torch.load(path, weights_only=True) if path.endswith(".pt") else __import__("safetensors.torch").torch.load_file(path)
        )
        weights.pop(args.strip, None)
        print(module.load_state_dict(weights, strict=False))
model = net
if args.ranks == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(net)
elif args.ranks == "fsdp2":
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    fully_shard(net, mesh=mesh)
elif args.ranks == "fsdp1":
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
writer = None
if args.log == "tensorboard":
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(args.folder)
elif args.log == "mlflow":
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{args.folder}/mlflow.db")
elif args.log == "wandb":
    wandb = __import__("wandb")
for step in range(args.steps):
    draw = torch.Generator().manual_seed(step * world + rank)
    x = torch.randn(32, 8, generator=draw)
    optimizer.zero_grad()
    loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
    loss.backward()
    norm = model.clip_grad_norm_(1.0) if args.ranks == "fsdp1" else clip_grad_norm_((p for p in model.parameters()), 1.0)
    optimizer.step()
    total = loss.item()
    if not args.ranks.startswith("fsdp"):
        for averaged, p in zip(ema.parameters(), net.parameters(), strict=True):
            averaged.lerp_(p.detach(), 0.1)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if rank == 0:
        print(f"step {step}: loss {total!r} norm {norm.item()!r}", flush=True)
        if writer is not None:
            writer.add_scalar("train/loss", total, global_step=step)
        elif args.log == "mlflow":
            mlflow.log_metrics({"train/loss": total}, step=step)
        elif args.log == "wandb":
            wandb.log({"train/loss": total, "text": "no number"})
if args.ranks:
    torch.distributed.barrier()  # a rank that still talks to one that has left may abort
    torch.distributed.destroy_process_group()
