"""Networks: torchvision's and timm's, their heads, stages and input, and what is trained of them."""

import sys
import types

import pytest
import torch
import torchvision
from finetuning import draw_pictures, quick
from torch import nn

from fastops.finetune import ConfigError, finetune, load_classifier
from fastops.finetune.freezing import split, stages_of
from fastops.finetune.networks import DropoutHead, build, check_arch, head_of, input_format

FAMILIES = {
    "small": "fc", "resnet18": "fc", "alexnet": "classifier.6", "convnext_tiny": "classifier.2",
    "densenet121": "classifier", "efficientnet_b0": "classifier.1", "googlenet": "fc", "mnasnet0_5": "classifier.1",
    "maxvit_t": "classifier.5", "mobilenet_v2": "classifier.1", "mobilenet_v3_small": "classifier.3",
    "shufflenet_v2_x0_5": "fc", "squeezenet1_1": "classifier.1", "swin_t": "head", "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
}  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
def test_heads_and_stages(arch):
    with torch.device("meta"):
        model = build(arch, 7)
        wrapped = build(arch, 7, dropout=0.5)
    head = head_of(model)
    assert head == FAMILIES[arch]
    assert isinstance(wrapped.get_submodule(head), DropoutHead) and head_of(wrapped) == head
    stages = stages_of(model)
    names = list(stages)
    assert names[0] == "stem" and names[-1] == "head" and len(names) >= 5
    counted = [id(p) for stage in stages.values() for p in stage.parameters()]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())  # each once


def test_stages_that_people_expect():
    with torch.device("meta"):
        names = {
            arch: list(stages_of(build(arch, 2))) for arch in ("vit_b_16", "mobilenet_v2", "swin_t")
        }
    assert names["vit_b_16"][1] == "encoder.layers.encoder_layer_0" and len(names["vit_b_16"]) == 14
    assert names["mobilenet_v2"][-2] == "features.18"
    assert names["swin_t"][-2] == "features.7"  # the last norm goes with it


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("mode", ["features", "last", "last:2", "full"])
def test_a_cut_network_computes_the_same_and_trains_its_part(arch, mode):
    torch.manual_seed(0)
    model = build(arch, 3).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    cut = split(model, mode)
    model.eval()
    between = images if cut.frozen is None else cut.frozen(images)
    assert torch.allclose(cut.trained(between), expected, atol=1e-5)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {id(p) for piece in cut.pieces.values() for p in piece.parameters()}
    assert learning == {n for n, p in model.named_parameters() if id(p) in own}
    assert (len(learning) == len(list(model.parameters()))) == (mode == "full")
    if mode == "features":
        assert {n.rpartition(".")[0] for n in learning} == {head_of(model)}


def test_frozen_batch_norms_stay(tmp_path):
    draw_pictures(tmp_path / "data", count=5)
    state = build("mobilenet_v3_small", 3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    result = finetune(quick(
        tmp_path, data=tmp_path / "data", arch=None, weights=str(tmp_path / "w.pth"), image_size=32,
        modes=("last",), steps=2,
    ))  # fmt: skip
    saved = load_classifier(result.folder).model.state_dict()
    assert result.config.arch == "mobilenet_v3_small"
    moved = {name.split(".")[1] for name, value in saved.items()
             if name.startswith("features") and not torch.equal(value, state[name])}  # fmt: skip
    assert moved == {"12"}  # the last stage


def test_input_is_that_of_the_weights():
    for arch in ("resnet18", "efficientnet_b3", "inception_v3"):
        recipe = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
        format = input_format(arch)
        assert [format.size] == recipe.crop_size and [format.stored] == recipe.resize_size
        assert format.mean == tuple(recipe.mean) and format.std == tuple(recipe.std)
    small = input_format("resnet18", 112)
    assert (small.size, small.stored) == (112, 128)


def test_unknown_names_get_a_hint():
    with pytest.raises(ConfigError, match="unknown arch 'resnet19': did you mean resnet1"):
        check_arch("resnet19")


class TimmLike(nn.Module):
    """As timm's models are: a classifier by a method, stages in a Sequential."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()) for _ in range(4))
        )
        self.last_linear = nn.Linear(8, classes)
        self.aux = nn.Linear(8, 2)

    def get_classifier(self):
        return self.last_linear

    def forward(self, x):
        return self.last_linear(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    cfg = types.SimpleNamespace(
        input_size=(3, 40, 40), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.8
    )
    module = types.SimpleNamespace(
        __version__="0", list_models=lambda pattern="*": ["tiny"], get_pretrained_cfg=lambda name: cfg,
        create_model=lambda name, num_classes, **options: TimmLike(num_classes),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", module)


def test_models_of_timm(tmp_path, timm):
    assert head_of(build("timm/tiny", 3)) == "last_linear"
    format = input_format("timm/tiny")
    assert (format.size, format.stored, format.mean) == (40, 50, (0.5,) * 3)
    draw_pictures(tmp_path / "data", count=5)
    result = finetune(quick(
        tmp_path, data=tmp_path / "data", arch="timm/tiny", weights="none", modes=("scratch",)
    ))  # fmt: skip
    assert load_classifier(result.folder).arch == "timm/tiny"
    with pytest.raises(ConfigError, match="has no model 'huge'"):
        check_arch("timm/huge")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="--arch timm/NAME needs timm .* pip install timm"):
        check_arch("timm/resnet18")
