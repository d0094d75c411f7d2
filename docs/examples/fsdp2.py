"""FSDP2: parameters, gradients and optimizer states in shards, one for each process; fastops steps the shards.

    torchrun --nproc-per-node=2 docs/examples/fsdp2.py     (or plain python: one process, one shard)

gloo on CPUs, nccl on GPUs. All processes together take one batch; the losses do not depend on their number.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import fastops
import fastops.functional as F

STEPS, BATCH, WIDTH, CLASSES = 8, 12, 48, 5


def make_model() -> torch.nn.Module:
    blocks = [
        torch.nn.Sequential(
            torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()
        )
        for _ in range(3)
    ]
    return torch.nn.Sequential(*blocks, torch.nn.Linear(WIDTH, CLASSES))


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """For a checkpoint: the whole weights, in the first process. Every process calls this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items()}  # one process gets no copies


def main() -> None:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = "cuda" if cuda else "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = make_model().to(device)
    images, labels = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % CLASSES
    own = slice(BATCH * rank // processes, BATCH * (rank + 1) // processes)
    images, labels = images[own].to(device), labels[own].to(device)

    fastops.patch(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    # The optimizer sees DTensors and steps each process's part of them, all in one kernel.
    optimizer = fastops.optim.AdamW(
        fastops.optim.param_groups(model, weight_decay=0.05),
        lr=1e-2,
        max_grad_norm=1.0,  # the norm of all shards
        ema_decay=0.9,
    )
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared = loss.detach().clone()
        dist.all_reduce(shared)
        losses.append(shared.item() / processes)

    held = sum(p.to_local().numel() for p in model.parameters())
    every = sum(p.numel() for p in model.parameters())
    shares = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(processes)]
    dist.all_gather(shares, torch.tensor([held], device=device))
    weights = whole_weights(model)
    with optimizer.swap_ema():
        averages = whole_weights(model)
    if rank == 0:
        print("losses", *(f"{value:.6f}" for value in losses))
        print("shards", *(int(share) for share in shares), "of", every)
        print("weights", *(f"{float(w.double().norm()):.6f}" for w in weights.values()))
        print("averages", *(f"{float(w.double().norm()):.6f}" for w in averages.values()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
