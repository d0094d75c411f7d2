"""The command: python -m fastops doctor | finetune | evaluate | predict | export."""

import argparse
import os
import sys
from collections.abc import Sequence

from fastops import doctor


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command with its subcommands."""
    parser = argparse.ArgumentParser(
        prog="python -m fastops", description="Fused kernels for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="show what is installed, what it can use, and whether it computes what torch does",
    )
    add_finetune(commands)
    add_evaluate(commands)
    add_predict(commands)
    add_export(commands)
    return parser


def add_finetune(commands) -> None:
    """The finetune subcommand: one option for each field of FineTuneConfig."""
    from fastops.finetune.options import add_options

    parser = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained network on pictures",
        usage="python -m fastops finetune [OPTION ...]",
        description=(
            "Fine-tune a pretrained network on a folder of pictures; the first lines say what will\n"
            "be done and why. Without options: five classes of Fashion-MNIST that the shipped\n"
            "network has not seen, ten images of each, in three modes and from scratch; nothing is\n"
            "downloaded."
        ),
        epilog=(
            "examples:\n"
            "  python -m fastops finetune\n"
            "  python -m fastops finetune --data photos/\n"
            "  python -m fastops finetune --data photos/ --weights resnet18.pth --compare\n"
            "  python -m fastops finetune --modes features,last:2 --seeds 5 --shots 5\n"
            "  python -m fastops finetune --backend both --modes full\n"
            "  python -m fastops finetune --backend both --modes full --profile\n"
            "  torchrun --nproc-per-node=2 -m fastops finetune"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = add_options(parser)
    output = list(groups.values())[-1]
    output.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run in FOLDER, with its own options"
    )
    output.add_argument(
        "--config",
        metavar="FILE",
        help="options from a JSON or YAML file; those given beside it win",
    )
    output.add_argument(
        "--profile", action="store_true", help="only say where the time of a step goes, by op"
    )
    output.add_argument("--dry-run", action="store_true", help="check and describe, do not train")
    output.add_argument("--quiet", action="store_true", help="print the closing table only")


def add_evaluate(commands) -> None:
    """The evaluate subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="say how good a fine-tuned network is",
        description=(
            "Evaluate a run's best network on the test images that it kept apart, or on a folder of\n"
            "pictures with a sub-folder for each class: accuracy, precision, recall and F1 by class,\n"
            "calibration, the most confused classes and the most wrong pictures."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="other pictures")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where evaluation.json and evaluation.html go (default: RUN)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, ..."
    )


def add_export(commands) -> None:
    """The export subcommand."""
    parser = commands.add_parser(
        "export",
        help="write a fine-tuned network for programs without fastops",
        description=(
            "Write a run's best network, read it again and compare what the two answer.\n\n"
            "pt2          a torch.export program from pixels to probabilities\n"
            "onnx         the same for ONNX runtimes\n"
            "torch        the weights by torchvision's or timm's names, for torch.load\n"
            "safetensors  the same without pickle"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, or a checkpoint in it")
    parser.add_argument("--format", default="pt2", metavar="NAME", help="default: pt2")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/network.SUFFIX")


def add_predict(commands) -> None:
    """The predict subcommand."""
    parser = commands.add_parser(
        "predict",
        help="say what is on pictures",
        description="Classify picture files with a network that finetune has trained.",
        epilog="exit code: 0 done, 1 some pictures cannot be read, 2 nothing can be answered",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN", help="the run's folder, or one of RUN/checkpoints/MODE.pt"
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="picture files, or folders of them"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=1,
        metavar="N",
        help="name the N likeliest classes (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each picture")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, ..."
    )


def run_finetune(options: argparse.Namespace) -> None:
    """Make a FineTuneConfig of the options that were given, run it and print the table."""
    from fastops.finetune import ConfigError, FineTuneConfig, finetune, processes, profile, resume
    from fastops.finetune.options import flag, given_options
    from fastops.finetune.text import for_terminal

    given = given_options(options)
    if options.resume is not None:
        threads = given.pop("threads", None)
        names = [*given, *(name for name in ("dry_run", "profile") if getattr(options, name))]
        if names:
            raise ConfigError(
                f"--resume takes the options of the run; leave out {', '.join(map(flag, names))}"
            )
        result = resume(options.resume, threads=threads, show=not options.quiet)
    elif options.profile and not options.dry_run:
        print(for_terminal(profile(FineTuneConfig(**given))))
        return
    else:
        config = FineTuneConfig(**given)
        result = finetune(config, show=not options.quiet, dry_run=options.dry_run)
    if not processes.first():
        return
    if result.folder is None:
        print("\n".join(result.description))
        return
    print(for_terminal(str(result)))
    print(f"\nSee {result.folder / 'report.html'}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the figures and write the page."""
    import dataclasses
    import json
    from pathlib import Path

    from fastops.finetune import OutputError
    from fastops.finetune.devices import find_device
    from fastops.finetune.evaluation import evaluate, write_evaluation
    from fastops.finetune.text import for_terminal

    out = Path(options.out or options.run)
    if options.out is not None and not out.is_dir():
        raise OutputError(f"cannot write into {out}: there is no such folder")
    found = evaluate(options.run, options.folder, device=find_device(options.device))
    if options.json:
        print(json.dumps({"name": found.name, **dataclasses.asdict(found.metrics)}))
    else:
        print(for_terminal(str(found)))
    if out.is_dir():
        *_, page = write_evaluation(found, out)
        if not options.json:
            print(f"\nSee {page}")


def run_export(options: argparse.Namespace) -> None:
    """Write a file and say how it compares."""
    from pathlib import Path

    from fastops.finetune import ConfigError, OutputError, export_network, load_classifier
    from fastops.finetune.export import FORMATS

    if options.format not in FORMATS:
        raise ConfigError(f"unknown format {options.format!r}: choose from {', '.join(FORMATS)}")
    run = Path(options.run)
    folder = run if run.is_dir() else run.parent
    path = Path(options.out) if options.out else folder / f"network{FORMATS[options.format]}"
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: name a file in a folder that exists")
    print(export_network(load_classifier(run), path, options.format))


def run_predict(options: argparse.Namespace) -> int:
    """Print one line for each picture, its error if it cannot be read; returns the exit code."""
    import json

    from fastops.finetune import ConfigError, load_classifier
    from fastops.finetune.devices import find_device
    from fastops.finetune.folders import find_pictures

    if options.top_k < 1:
        raise ConfigError(f"--top-k must be 1 or more, got {options.top_k}")
    classifier = load_classifier(options.checkpoint)
    classifier.model.to(find_device(options.device))
    failures = answers = 0
    for answer in classifier.rank(find_pictures(options.images), options.top_k):
        if answer.error is not None:
            failures += 1
            print(f"python -m fastops predict: error: {answer.error}", file=sys.stderr)
        else:
            answers += 1
        if options.json:
            found = [{"class": name, "probability": share} for name, share in answer.classes]
            line = {"path": str(answer.path), "classes": found}
            if answer.error is not None:
                line["error"] = str(answer.error)
            print(json.dumps(line))
        elif answer.classes:
            names = ", ".join(f"{name} ({share:.1%})" for name, share in answer.classes)
            print(f"{answer.path}: {names}", flush=True)
    if not failures:
        return 0
    return 1 if answers else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: done. 1: some of the pictures to predict cannot be read. 2: wrong options, data, weights or
    output folder, said in one line. 130: Ctrl-C. 141: the reader of the output has gone.
    """
    options = make_parser().parse_args(arguments)
    if options.command == "doctor":
        return doctor.main()
    try:
        from fastops.finetune import FineTuneError, experiment, processes  # noqa: F401
        from fastops.finetune.text import any_terminal
    except ModuleNotFoundError as error:
        print(
            f"{options.command} needs {error.name}: pip install torch-fastops[finetune]",
            file=sys.stderr,
        )
        return 2
    with any_terminal():
        try:
            run = {
                "finetune": run_finetune,
                "evaluate": run_evaluate,
                "predict": run_predict,
                "export": run_export,
            }
            code = run[options.command](options) or 0
            sys.stdout.flush()
            return code
        except FineTuneError as error:
            if processes.first():
                print(f"python -m fastops {options.command}: error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # `... | head`
            # What is still to be flushed at exit would raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            if processes.first() and options.command == "finetune":
                print(
                    "\ninterrupted; finished runs are reported in their folder, and "
                    "--resume FOLDER goes on",
                    file=sys.stderr,
                )
            return 130


if __name__ == "__main__":
    sys.exit(main())
