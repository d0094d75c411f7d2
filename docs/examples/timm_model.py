"""timm with fastops: act_layer= when a model is built, patch() for what that does not reach, and the optimizer registry,
so that create_optimizer_v2 (and the --opt of timm's train.py) knows fastops's optimizer by name.

    python docs/examples/timm_model.py

The same training is run with torch's own classes, for comparison.
"""

import sys

import torch

import fastops

try:
    import timm
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry
except ModuleNotFoundError as error:
    print(f"timm_model.py needs timm ({error}): pip install timm", file=sys.stderr)
    sys.exit(2)

STEPS = 6
MODELS = {"test_vit": fastops.nn.GELU, "test_resnet": fastops.nn.ReLU}


def register() -> None:
    default_registry.register(
        OptimInfo(
            name="fastops_adamw",
            opt_class=fastops.optim.AdamW,
            description="fused AdamW of fastops",
            has_betas=True,
        )
    )


def train(name: str, fast: bool) -> list[float]:
    torch.manual_seed(0)
    options = {"act_layer": MODELS[name]} if fast else {}
    model = timm.create_model(name, num_classes=4, **options)
    if fast:
        print(f"{name}, patched: {fastops.patch(model, functional=True)}")
    optimizer = create_optimizer_v2(
        model, opt="fastops_adamw" if fast else "adamw", lr=1e-3, weight_decay=0.05
    )
    criterion = fastops.nn.CrossEntropyLoss() if fast else torch.nn.CrossEntropyLoss()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    losses = []
    for _ in range(STEPS):
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    register()
    for name in MODELS:
        losses, native = train(name, fast=True), train(name, fast=False)
        print(name, "fastops", *(f"{value:.6f}" for value in losses))
        print(name, "torch", *(f"{value:.6f}" for value in native))


if __name__ == "__main__":
    main()
