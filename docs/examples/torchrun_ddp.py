"""DistributedDataParallel: patch before wrapping, fastops's loss and optimizer in each process as in one.

    torchrun --nproc-per-node=2 docs/examples/torchrun_ddp.py     (or plain python: one process)

gloo on CPUs, nccl on GPUs. All processes together take one batch; the losses do not depend on their number.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastops
import fastops.functional as F

EPOCHS, BATCH, WIDTH, CLASSES = 4, 16, 24, 4


def main() -> None:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = "cuda" if cuda else "cpu"
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    inputs = torch.randn(4 * BATCH, WIDTH)
    data = TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))
    loader = DataLoader(
        data, batch_size=BATCH // processes, sampler=DistributedSampler(data, shuffle=False)
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 64), torch.nn.GELU(), torch.nn.Linear(64, CLASSES)
    )
    fastops.patch(model)
    model = DistributedDataParallel(model.to(device))
    # Each process has the mean gradient when it steps, so that all clip by the same norm.
    optimizer = fastops.optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    losses = []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / len(loader) / processes)

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(processes)]
    dist.all_gather(everyone, weights)
    if rank == 0:
        print("processes", processes)
        print("losses", *(f"{value:.6f}" for value in losses))
        print("weights", *(f"{float(p.detach().double().norm()):.6f}" for p in model.parameters()))
        print("same in all", all(torch.equal(weights, other) for other in everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
