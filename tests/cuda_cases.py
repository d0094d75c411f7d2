"""What the tests on a CUDA device, a GPU or the emulated one, start from."""

from itertools import groupby

import torch
from cases import cases

ALL = cases()
# One case of each op.
FEW = [
    next(case for case in group if case.tensors[0].numel() >= 8)
    for _, group in groupby(ALL, key=lambda case: case.op.name)
]


def inputs_of(case, device):
    return case.to(torch.float32).on(device)


def captured(function):
    """function() in a CUDA graph: (the graph, what it writes to)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function()
    return graph, y
