"""A tour of what a network is trained with, on fastops: activations, losses, optimizers with L1 and L2 regularisation,
dropout, and transfer learning with a ResNet-18 (a frozen backbone first, its last stage at a low rate after).

    python docs/examples/pytorch_primer.py [--pretrained]     # --pretrained downloads torchvision's weights
"""

import argparse

import torch
from torchvision import models

import fastops
import fastops.nn as nn
import fastops.optim as optim


def activations() -> None:
    x = torch.linspace(-3, 3, 7)
    for module in (nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU()):
        print(f"{module!s:24}", [round(v, 3) for v in module(x).tolist()])
    print(f"{'Softmax of a row':24}", nn.Softmax(dim=1)(x[None]).sum().item())


def losses() -> None:
    prediction, target = torch.tensor([0.2, 0.9, 0.6]), torch.tensor([0.0, 1.0, 1.0])
    print("MSE", nn.MSELoss()(prediction, target).item())
    print("MAE", nn.L1Loss()(prediction, target).item())
    print("BCE", nn.BCELoss()(prediction, target).item())
    logits, classes = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]]), torch.tensor([0, 2])
    print("cross-entropy of class indices", nn.CrossEntropyLoss()(logits, classes).item())
    one_hot = torch.nn.functional.one_hot(classes, 3).float()
    print("cross-entropy of one-hot rows", nn.CrossEntropyLoss()(logits, one_hot).item())


def optimizers() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    y = x[:, :3].sum(1, keepdim=True)  # 17 of the 20 inputs mean nothing
    for name, make in {
        "SGD": lambda p: optim.SGD(p, lr=0.1),
        "Adam": lambda p: optim.Adam(p, lr=0.05),
        "Adam, L2": lambda p: optim.Adam(p, lr=0.05, weight_decay=1e-2),
        "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
        "SGD, L1 (proximal)": lambda p: optim.SGD(p, lr=0.1, l1=0.1, l1_mode="proximal"),
    }.items():
        model = torch.nn.Linear(20, 1)
        optimizer = make(model.parameters())
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.MSELoss()(model(x), y)
            loss.backward()
            optimizer.step()
        zeros = (model.weight == 0).sum().item()
        print(f"{name:20} loss {loss.item():8.5f}, weights that are exactly 0: {zeros} of 20")


def dropout() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 50), nn.ReLU(), nn.Dropout(p=0.5))
    x, layer = torch.ones(10000), model[-1]
    y = layer(x)
    print(f"{layer} in training: {(y == 0).float().mean():.2f} are 0, the others {y.max().item()}")
    model.eval()
    print(f"{layer} in eval: nothing changes, {torch.equal(layer(x), x)}")


def transfer_learning(pretrained: bool) -> None:
    torch.manual_seed(0)
    model = models.resnet18(weights="DEFAULT" if pretrained else None)
    print(fastops.patch(model))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = torch.nn.Linear(model.fc.in_features, 10)  # new, so it is trained
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    criterion = nn.CrossEntropyLoss()

    def train(optimizer, steps: int) -> float:
        model.eval()  # the backbone's normalisation keeps its statistics
        for _ in range(steps):
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        return loss.item()

    before = model.conv1.weight.clone()
    print("feature extraction: loss", train(optim.Adam(model.fc.parameters(), lr=1e-2), 10))
    for parameter in model.layer4.parameters():
        parameter.requires_grad = True
    trained = [p for p in model.parameters() if p.requires_grad]
    print("last stage, low rate: loss", train(optim.Adam(trained, lr=1e-5), 3))
    assert torch.equal(model.conv1.weight, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pretrained", action="store_true", help="download torchvision's weights")
    arguments = parser.parse_args()
    activations()
    losses()
    optimizers()
    dropout()
    transfer_learning(arguments.pretrained)


if __name__ == "__main__":
    main()
