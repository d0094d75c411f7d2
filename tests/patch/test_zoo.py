"""Models that others have built, patched: outputs and gradients of torchvision's, timm's and Hugging Face's are as near to
float64's as without. Each family by its smallest member; `make zoo` (FASTOPS_ZOO=1) takes every torchvision classification
model."""

import copy
import os

import pytest
import torch
import torchvision
from models import Spy
from torch import nn

import fastops

ALL = os.environ.get("FASTOPS_ZOO", "") not in ("", "0")
EPS = torch.finfo(torch.float32).eps


def without_dropout(m):
    """Masks are ours, and so other ones: p = 0 leaves the rest to compare."""
    for module in m.modules():
        drops = "rop" in type(module).__name__ or type(module).__name__ == "StochasticDepth"
        # drop_rate: of models of timm's that call F.dropout themselves
        for name in ("p", "drop_prob") * drops + ("drop_rate",):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return m


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values if v is not None for t in tensors(v)]


def run(m, given, training):
    """The outputs, the gradients of the parameters, and the buffers: statistics, where it trains."""
    m.train(training)
    outputs = [o for o in tensors(m(**given) if isinstance(given, dict) else m(given)) if o.is_floating_point()]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs).backward()  # fmt: skip
    grads = [p.grad for p in m.parameters() if p.grad is not None]
    m.zero_grad()  # frees nothing that `grads` holds
    return (
        [o.detach() for o in outputs],
        grads,
        [b.clone() for b in m.buffers() if b.is_floating_point()],
    )


def deviation(found, exact):
    """The norm of the difference over that of `exact`, of all the tensors as one vector."""
    off = sum((f.double() - e).norm() ** 2 for f, e in zip(found, exact, strict=True))
    return (off / sum(e.norm() ** 2 for e in exact)).sqrt().item()


def floats(change, given):
    """`given`, with change(t) for each float tensor t."""
    if not isinstance(given, dict):
        return change(given)
    return {k: change(v) if v.is_floating_point() else v for k, v in given.items()}


def nudged(given, seed):
    """Every float one rounding up or down."""
    generator = torch.Generator().manual_seed(seed)
    return floats(lambda t: t * (1 + EPS * (torch.randint(2, t.shape, generator=generator) * 2 - 1)), given)  # fmt: skip


def copy_of(m):
    """A copy on the same parameters."""
    return copy.deepcopy(m, {id(p): p for p in m.parameters()})


def assert_as_near(plain, ours, given, functional):
    """The project's one tolerance, over all outputs, all gradients and all buffers: twice torch's own error, plus 4 eps.

    A model is no smooth function: where rounding carries a sum across the kink of a relu, gradients jump by far more than
    rounding, torch's as ours, and not always at the same sums. Hence two comparisons. In float64 no sum comes that near
    to a kink, and what is left is a difference of meaning: none of 4 eps of float32 (torch's own float64 hardswish holds
    1/6 as a float32). In float32, torch's own error is the largest over this input and, where that is too small by luck,
    over four of its neighbours.
    """
    wide = floats(torch.Tensor.double, given)
    for training in (False, True):
        exact_model = copy.deepcopy(plain).double()
        patched = copy_of(exact_model)
        exact = run(exact_model, wide, training)
        fastops.patch(patched, functional=functional)
        meant = run(patched, wide, training)
        del exact_model, patched
        theirs, mine = run(copy_of(plain), given, training), run(ours, given, training)
        for k, what in enumerate(("outputs", "gradients", "buffers")):
            if not exact[k]:
                continue
            what = f"{what}, training={training}"
            found = deviation(meant[k], exact[k])
            assert found <= 4 * EPS, f"{what}: float64 is off by {found:.3g}, allowed {4 * EPS:.3g}"
            found, own = deviation(mine[k], exact[k]), deviation(theirs[k], exact[k])
            for seed in range(4):
                if not found <= 2 * own + 4 * EPS:
                    near = run(copy_of(plain), nudged(given, seed), training)
                    own = max(own, deviation(near[k], exact[k]))
            allowed = 2 * own + 4 * EPS
            assert found <= allowed, f"{what}: {found:.3g}, allowed {allowed:.3g}"


def check(make, given, functional, least=1):
    """Patches a model, and compares it with what it was, both against float64."""
    torch.manual_seed(0)
    plain = without_dropout(make())
    for p in plain.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # heads that begin at zero, sums that begin on a kink
        # A gradient for every layer that has a bias or a norm is enough; the largest models fill the memory with them.
        p.requires_grad_(p.numel() <= 1 << 20)
    ours = copy_of(plain)
    keys, modules = list(ours.state_dict()), list(ours.modules())
    classes = [type(m) for m in modules]
    report = fastops.patch(ours, functional=functional)
    assert len(report.replaced) >= least, report
    assert not fastops.patch(ours, functional=functional).replaced
    assert list(ours.state_dict()) == keys
    assert_as_near(plain, ours, given, functional)
    fastops.unpatch(ours)
    assert all(a is b for a, b in zip(modules, ours.modules(), strict=True))
    assert [type(m) for m in modules] == classes
    return report


# ---------------------------------------------------------------------------------------------- torchvision


def small_vit(tv):
    return tv.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=10)


def small_swin(tv, version):
    parts = tv.models.swin_transformer
    block = parts.SwinTransformerBlockV2 if version == 2 else parts.SwinTransformerBlock
    merge = parts.PatchMergingV2 if version == 2 else parts.PatchMerging
    return tv.models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=10, block=block, downsample_layer=merge
    )


def small_convnext(tv):
    setting = tv.models.convnext.CNBlockConfig
    return tv.models.ConvNeXt([setting(16, 32, 2), setting(32, None, 2)], num_classes=10)


def small_maxvit(tv):
    return tv.models.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)


def narrow(m):
    """Without the hundred million weights of its first linear layers."""
    first = next(i for i, k in enumerate(m.classifier) if isinstance(k, nn.Linear))
    second = next(i for i, k in enumerate(m.classifier) if isinstance(k, nn.Linear) and i > first)
    m.classifier[first] = nn.Linear(m.classifier[first].in_features, 32)
    m.classifier[second] = nn.Linear(32, m.classifier[second].out_features)
    if isinstance(m.classifier[-1], nn.Linear) and len(m.classifier) - 1 != second:
        m.classifier[-1] = nn.Linear(m.classifier[second].out_features, 10)
    return m


# name: (how to make it of torchvision, side of the images, functional, least number of replacements)
FAMILIES = {
    "alexnet": (lambda tv: narrow(tv.models.alexnet()), 64, False, 9),
    "convnext": (small_convnext, 32, False, 4),
    "densenet": (lambda tv: tv.models.DenseNet(8, (2, 2), 16, num_classes=10), 32, True, 9),
    "efficientnet": (lambda tv: tv.models.efficientnet_b0(num_classes=10), 64, False, 60),
    "googlenet": (lambda tv: tv.models.googlenet(num_classes=10, init_weights=False, aux_logits=False), 64, True, 55),
    "inception": (lambda tv: tv.models.inception_v3(num_classes=10, init_weights=False, aux_logits=False), 96, True, 90),
    "maxvit": (small_maxvit, 32, True, 10),
    "mnasnet": (lambda tv: tv.models.mnasnet0_5(num_classes=10), 64, False, 30),
    "mobilenet_v2": (lambda tv: tv.models.mobilenet_v2(num_classes=10, width_mult=0.35), 64, False, 30),
    "mobilenet_v3": (lambda tv: tv.models.mobilenet_v3_small(num_classes=10), 64, False, 30),
    "regnet": (lambda tv: tv.models.regnet_y_400mf(num_classes=10), 64, False, 16 * 4),
    "resnet18": (lambda tv: tv.models.resnet18(num_classes=10), 64, False, 9 + 8),
    "resnet bottleneck": (lambda tv: tv.models.ResNet(tv.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=10), 64, False, 6 + 5),
    "shufflenet": (lambda tv: tv.models.shufflenet_v2_x0_5(num_classes=10), 64, False, 30),
    "squeezenet": (lambda tv: tv.models.squeezenet1_1(num_classes=10), 64, False, 20),
    "swin": (lambda tv: small_swin(tv, 1), 32, True, 8),
    "swin v2": (lambda tv: small_swin(tv, 2), 32, True, 8),
    "vgg": (lambda tv: narrow(tv.models.vgg11_bn()), 32, False, 12),
    "vit": (small_vit, 32, False, 6),
}  # fmt: skip


def images(side, number=4):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_torchvision(family):
    make, side, functional, least = FAMILIES[family]
    check(lambda: make(torchvision), images(side), functional, least)


if ALL:

    @pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
    def test_every_torchvision_model(name):
        side = 224 if name.startswith("maxvit") else 96 if "inception" in name else 64
        kwargs = {"num_classes": 10}
        if name.startswith("vit_"):
            side = 56 if name.endswith("14") else 64
            kwargs["image_size"] = side
        if name in ("googlenet", "inception_v3"):
            kwargs |= {"init_weights": False, "aux_logits": False}

        def make():
            m = torchvision.models.get_model(name, **kwargs)
            return narrow(m) if name.startswith(("vgg", "alexnet")) else m

        check(make, images(side, 2 if side == 224 else 4), functional=True)


# ---------------------------------------------------------------------------------------------- timm

# Fifteen families and the side of their images; `test_*` are timm's own miniatures.
TIMM = {
    "test_byobnet": 64, "test_convnext": 64, "test_efficientnet": 64, "test_mambaout": 64, "test_nfnet": 64,
    "test_resnet": 64, "test_vit": 160, "dla46_c": 64, "edgenext_xx_small": 64, "ghostnet_050": 64, "lcnet_035": 64,
    "mobilenetv3_small_050": 64, "mobilevit_xxs": 64, "regnetx_002": 64, "rexnet_100": 64,
}  # fmt: skip


@pytest.mark.integration("timm")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    import timm

    check(lambda: timm.create_model(name, num_classes=10), images(TIMM[name]), functional=True)


# ---------------------------------------------------------------------------------------------- Hugging Face

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TOKENS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(3))


def bert(hf, attention):
    config = hf.BertConfig(vocab_size=100, **TINY, attn_implementation=attention)
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": torch.tensor([0, 1, 1])}  # fmt: skip
    return (lambda: hf.BertForSequenceClassification(config)), given


def gpt2(hf, attention):
    config = hf.GPT2Config(
        vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation=attention,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return (lambda: hf.GPT2LMHeadModel(config)), {"input_ids": TOKENS, "labels": TOKENS}


def vit(hf, attention):
    config = hf.ViTConfig(image_size=32, patch_size=8, **TINY, attn_implementation=attention)
    given = {"pixel_values": images(32), "labels": torch.tensor([0, 1, 1, 0])}
    return (lambda: hf.ViTForImageClassification(config)), given


@pytest.mark.integration("transformers")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [bert, gpt2, vit], ids=lambda f: f.__name__)
def test_hugging_face(build, attention):
    import transformers

    make, given = build(transformers, attention)
    report = str(check(make, given, functional=True, least=7))
    assert ("NewGELUActivation" if build is gpt2 else "GELUActivation: gelu") in report
    assert "cross_entropy" in report


@pytest.mark.integration("transformers")
def test_hugging_face_functions_that_run():
    import transformers

    make, given = gpt2(transformers, "eager")
    m = make().eval()
    fastops.patch(m, functional=True)
    with Spy() as spy:
        m(**given).loss.backward()
    ran = {o.split(".")[1] for o in spy.ops if o.startswith("fastops.")}
    assert {"softmax", "gelu_tanh", "cross_entropy_forward"} <= ran
    assert m.config.architectures is None or m.config.architectures == ["GPT2LMHeadModel"]
    assert m.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[0] == 3


@pytest.mark.integration("transformers")
def test_hugging_face_saves_and_loads(tmp_path):
    import transformers as hf

    make, given = bert(hf, "sdpa")
    m = make().eval()
    fastops.patch(m, functional=True)
    m.save_pretrained(tmp_path)
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is hf.BertForSequenceClassification
    torch.testing.assert_close(again(**given).logits, m(**given).logits)
