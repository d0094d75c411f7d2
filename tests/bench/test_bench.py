"""The benchmark: that it covers every op, never times a wrong one, and reports what it did. No time is asserted."""

import gc
import inspect
import json
import sys
import types
from dataclasses import replace
from math import prod

import pytest
import torch

import bench.__main__ as command
import fastops
from bench.calls import Contenders, make_inputs
from bench.cases import OPTIMIZERS, PARAMETERS, all_cases
from bench.report import write_json
from bench.timing import FEW, LEAST, make_copy, measure
from bench.verify import Wrong, compare
from fastops._core.registry import OPS

RELU = "relu 16 "
TRAINED = "relu 16 float32 forward+backward"
DROPOUT = "dropout 128x1024 float32 forward+backward"


def bench_json(path, *arguments):
    """Runs the command on next to no time; returns its exit code and the rows it wrote."""
    code = command.main(["--quick", "--time", "0.001", "--json", str(path), *arguments])
    environment, *rows = map(json.loads, path.read_text().splitlines())
    assert environment["environment"]["versions"]
    return code, rows


@pytest.fixture
def untimed(monkeypatch):
    """Makes any attempt at timing fail."""

    def measure(*args):
        pytest.fail("a row was timed")

    monkeypatch.setattr(command, "measure", measure)


# ---------------------------------------------------------------------------------------------- the table of cases


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_cases_in_both_modes_and_inputs_for_them(name):
    cases = [case for case in all_cases(OPS) if case.op == name]
    assert {case.mode for case in cases} == {"forward", "forward+backward"}
    smallest = min(cases, key=lambda case: case.floor)
    OPS[name].signature.bind(*make_inputs(smallest, "cpu").values(), **smallest.arguments)


def test_every_optimizer_has_a_line():
    ours = {
        name
        for name, cls in vars(fastops.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if hasattr(torch.optim, name) and cls.__module__.startswith("fastops")
    }
    assert ours <= OPTIMIZERS.keys()


def test_an_op_that_is_entered_gets_the_rows_of_its_kind():
    cases = all_cases({"new": replace(OPS["relu"], name="new")})
    assert [c.shapes for c in cases if c.op == "new"] == [
        c.shapes for c in all_cases(OPS) if c.op == "relu"
    ]


def test_labels_differ():
    labels = [case.label for case in all_cases(OPS)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("resnet18", 62, 11_689_512), ("resnet50", 161, 25_557_032)],
)
def test_resnet_shapes_are_torchvisions(name, tensors, elements):
    assert (len(PARAMETERS[name]), sum(map(prod, PARAMETERS[name]))) == (tensors, elements)


# ---------------------------------------------------------------------------------------------- a run


def test_a_run_verifies_times_and_writes_json(tmp_path, capsys):
    code, rows = bench_json(tmp_path / "out.jsonl", "--filter", RELU)
    assert code == 0
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["status"] == "ok"
        assert row["best"] in row["torch"]
        assert row["pairs"][row["best"]] >= FEW
        assert len(row["fastops"]) == len(row["ratios"]["eager"]) == 3
    out = capsys.readouterr().out
    assert "instruction set" in out
    assert "2 of 2 rows timed" in out
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_plain_table_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert command.main(["--quick", "--time", "0.001", "--filter", "relu 16 float32 forward"]) == 0
    head, rule, first, second = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert head.split()[:4] == ["op", "size", "type", "pass"]
    assert set(rule) == {"-", " "}
    assert first.split()[:4] == ["relu", "16", "f32", "fwd"]
    assert second.split()[:4] == ["relu", "16", "f32", "fwd+bwd"]


def test_random_ops_are_verified_and_timed(tmp_path):
    code, (row,) = bench_json(tmp_path / "out.jsonl", "--filter", DROPOUT)
    assert (code, row["status"]) == (0, "ok")


# ---------------------------------------------------------------------------------------------- wrong results


class WrongGradient(torch.autograd.Function):
    """relu, whose backward forgets the mask."""

    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, dy):
        return dy


def unscaled_dropout(input, p):
    return input * (torch.rand_like(input) >= p)


def frozen_dropout(input, p):
    mask = torch.rand(input.shape, generator=torch.Generator().manual_seed(0)) >= p
    return input * mask / (1 - p)


class OtherMask(torch.autograd.Function):
    """Dropout that draws another mask in backward."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return torch.nn.functional.dropout(x, p)

    @staticmethod
    def backward(ctx, dy):
        return torch.nn.functional.dropout(dy, ctx.p), None


@pytest.mark.parametrize(
    ("name", "text", "wrong", "reason"),
    [
        ("relu", RELU, lambda input: input.relu() + 1e-6, "value"),
        ("relu", RELU, lambda input: input.relu() * torch.nan, "value"),
        ("relu", RELU, lambda input: input.relu().double(), "value"),
        ("relu", RELU, lambda input: input.detach().relu_() + 0 * input, "was overwritten"),
        ("relu", TRAINED, lambda input: WrongGradient.apply(input), "gradient of input"),
        ("dropout", DROPOUT, unscaled_dropout, "value"),
        ("dropout", DROPOUT, lambda input, p: input * 1, "keeps 1.0000"),
        ("dropout", DROPOUT, frozen_dropout, "same mask"),
        ("dropout", DROPOUT, lambda input, p: OtherMask.apply(input, p), "gradient of input"),
    ],
)
def test_a_wrong_op_is_reported_and_not_timed(
    tmp_path, monkeypatch, capsys, untimed, name, text, wrong, reason
):
    monkeypatch.setitem(OPS, name, replace(OPS[name], function=wrong))
    code, rows = bench_json(tmp_path / "out.jsonl", "--filter", text)
    assert code == 1
    for row in rows:
        assert row["status"] == "WRONG"
        assert reason in row["notes"][0]
        assert "ratio" not in row
    assert "WRONG" in capsys.readouterr().out


def test_an_op_that_raises_is_an_error(tmp_path, monkeypatch, untimed):
    def broken(input):
        raise RuntimeError("out of order\nmore")

    monkeypatch.setitem(OPS, "relu", replace(OPS["relu"], function=broken))
    code, (row, _) = bench_json(tmp_path / "out.jsonl", "--filter", RELU)
    assert (code, row["status"], row["notes"]) == (1, "ERROR", ["RuntimeError: out of order"])


def test_an_argument_that_nobody_makes_is_an_error_that_says_where(tmp_path, monkeypatch, untimed):
    def other(x):
        return x.relu()

    signature = inspect.signature(other)
    entry = replace(OPS["relu"], function=other, signature=signature)
    monkeypatch.setitem(OPS, "relu", entry)
    code, (row, _) = bench_json(tmp_path / "out.jsonl", "--filter", RELU)
    assert (code, row["status"]) == (1, "ERROR")
    assert "fastops/selfcheck.py cannot make an argument 'x'" in row["notes"][0]


@pytest.fixture
def few_parameters(monkeypatch):
    """Leaves the optimizers' smallest case three tensors."""
    monkeypatch.setitem(PARAMETERS, "300x1024", ((1024,), (3, 5), ()))


class HastyAdam(torch.optim.Adam):
    """Adam that walks a little further than it was told."""

    def __init__(self, params, lr, **options):
        super().__init__(params, lr=lr * 1.001, **options)


def test_a_wrong_optimizer_is_reported_and_not_timed(
    tmp_path, monkeypatch, untimed, few_parameters
):
    monkeypatch.setattr(fastops.optim, "Adam", HastyAdam, raising=False)
    code, (row,) = bench_json(tmp_path / "out.jsonl", "--filter", "Adam 300x1024")
    assert (code, row["status"]) == (1, "WRONG")
    assert "parameters" in row["notes"][0]


def test_a_right_optimizer_is_timed_beside_torchs_three(tmp_path, monkeypatch, few_parameters):
    monkeypatch.setattr(fastops.optim, "Adam", torch.optim.Adam, raising=False)
    code, (row,) = bench_json(tmp_path / "out.jsonl", "--filter", "Adam 300x1024")
    assert (code, row["status"]) == (0, "ok")
    assert row["torch"].keys() == {"for-loop", "foreach", "fused"}


def test_a_missing_optimizer_is_a_visible_row(monkeypatch, capsys, untimed):
    monkeypatch.delattr(fastops.optim, "Adam", raising=False)
    assert command.main(["--quick", "--filter", "Adam 300x1024"]) == 0
    assert "skipped: fastops.optim has no Adam" in capsys.readouterr().out


def test_the_rule_scales_with_torchs_own_error():
    eps = torch.finfo(torch.float32).eps
    exact = torch.ones(3, dtype=torch.float64)
    native = torch.tensor([1, 1, 1 + 4 * eps])
    compare("x", torch.tensor([1 + 11 * eps, 1, 1]), native, exact)
    with pytest.raises(Wrong, match="1 of 3 differ"):
        compare("x", torch.tensor([1 + 13 * eps, 1, 1]), native, exact)
    compare("x", torch.ones(0), torch.ones(0), torch.ones(0, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- timing and output


def test_calls_alternate_and_the_collector_comes_back():
    order = []

    def slow(name):
        def call():
            order.append(name)
            torch.ones(300_000).exp_().log_()

        return call

    measured = measure(
        Contenders(slow("ours"), {"a": slow("a"), "b": slow("b")}), make_copy(64, "cpu"), 0, "cpu"
    )
    assert {len(ratios) for ratios in measured.ratios.values()} == {LEAST}
    assert len(measured.ours) == 2 * LEAST
    assert len(measured.copy) == LEAST
    assert gc.isenabled()
    changes = [now for last, now in zip([None, *order], order, strict=False) if now != last]
    assert changes[-4 * LEAST :] == ["a", "ours", "b", "ours"] * LEAST


def test_json_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "out.jsonl", {"unwritable": object()}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "cuda"],
        ["--device", "tpu"],
        ["--filter", "no such op"],
        ["--filter", "relu 16777216", "--quick"],
        ["--json", "no/such/folder/out.jsonl"],
        ["--json", "."],
        ["--report", __file__],
        ["--report", f"{__file__}/below"],
        ["--threads", "0"],
        ["--threads", "many"],
        ["--time", "0"],
        ["--time", "nan"],
        ["--unknown"],
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(monkeypatch, capsys, untimed, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m bench: error: ")
    assert err.count("\n") == 1


# ---------------------------------------------------------------------------------------------- the report, and peers


def test_a_report_has_lines_charts_and_one_page(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
    folder = tmp_path / "new" / "report"
    arguments = ["--quick", "--time", "0.001", "--filter", RELU, "--report", str(folder)]
    assert command.main(arguments) == 0
    charts = [f"{c}-{m}.png" for c in ("ratios", "speed") for m in ("forward", "forward-backward")]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*charts, "bench.jsonl", "index.html"]
    )
    environment, *rows = map(json.loads, (folder / "bench.jsonl").read_text().splitlines())
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(charts)
    assert "http" not in page
    for row in rows:
        assert row["op"] in page and f"<td>{row['of_copy']:.0%}</td>" in page
    for value in environment["environment"].values():
        assert value.replace("&", "&amp;") in page
    assert (folder / "speed-forward.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_shows_what_is_wrong_and_escapes_it(tmp_path):
    pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
    from bench.page import write_page

    row = {
        "op": "relu",
        "variant": "",
        "size": "16",
        "dtype": "float32",
        "mode": "forward",
        "status": "WRONG",
    }
    page = write_page(tmp_path, {"CPU": "a<b"}, [{**row, "notes": ["<off>"]}]).read_text()
    assert "WRONG: &lt;off&gt;" in page and "a&lt;b" in page and "1 WRONG" in page
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


@pytest.fixture
def peer(monkeypatch):
    """Enters a library whose Adam is `cls`."""
    import bench.peers as peers

    def enter(cls):
        library = types.ModuleType("a_library_of_others")
        library.TheirAdam = cls
        monkeypatch.setitem(sys.modules, library.__name__, library)
        monkeypatch.setattr(peers, "installed", lambda module: module in sys.modules)
        entry = peers.Peer(library.__name__, {"Adam": "TheirAdam"}, ("cpu",))
        monkeypatch.setattr(peers, "PEERS", {"theirs": entry})

    return enter


def test_a_peer_is_timed_and_never_the_baseline(tmp_path, peer):
    class Fast(torch.optim.Adam):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            if self.steps <= 3:  # what it is verified by; then it does nothing, in no time
                super().step(closure)

    peer(Fast)
    code, (row,) = bench_json(tmp_path / "out.jsonl", "--filter", "Adam 300x1024")
    assert code == 0 and row["status"] == "ok"
    assert list(row["peers"]) == ["theirs"] and "theirs" not in row["torch"]
    assert row["ratios"]["theirs"] and row["best"] != "theirs"


def test_a_wrong_peer_is_named_and_not_timed(tmp_path, peer):
    class Wrong(torch.optim.Adam):
        def __init__(self, params, lr, **rest):
            super().__init__(params, lr=lr * 1.01, **rest)

    peer(Wrong)
    code, (row,) = bench_json(tmp_path / "out.jsonl", "--filter", "Adam 300x1024")
    assert code == 0 and row["status"] == "ok" and row["peers"] == {}
    assert any("theirs is not timed" in note and "off torch's by" in note for note in row["notes"])


def test_a_peer_that_is_missing_is_left_out():
    from bench.peers import PEERS, makers

    assert set(makers("Adam", "cpu")) <= set(PEERS)
    assert "apex" not in makers("Adam", "cpu") and makers("NoSuch", "cpu") == {}
