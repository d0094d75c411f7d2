"""A small model that tests patch, and a spy that lists the ops that run."""

import torch
from torch import nn


class Block(nn.Module):
    """torchvision's BasicBlock, with norms that fastops leaves to torch."""

    def __init__(self, inplace=True, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.relu = nn.ReLU(inplace)
        self.downsample = nn.Conv2d(4, 4, 1) if downsample else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    """The ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def network():
    """A small network of convolutions, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 100),
    ).to(memory_format=torch.channels_last)


def losses(batches, net=None):
    """Those of training steps on batches of these sizes."""
    net = net or network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    found = []
    for n in batches:
        x = torch.randn(n, 3, 64, 64).to(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(net(x), torch.randint(0, 100, (n,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
