"""The command: python -m fastops doctor | finetune | predict."""

import argparse
import sys
from collections.abc import Sequence

from fastops import doctor


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command with its three subcommands."""
    parser = argparse.ArgumentParser(
        prog="python -m fastops", description="Fused kernels for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="show what is installed, what it can use, and whether it computes what torch does",
    )
    add_finetune(commands)
    add_predict(commands)
    return parser


def add_finetune(commands) -> None:
    """The finetune subcommand: one option for each field of FineTuneConfig."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained ResNet on few images",
        usage="python -m fastops finetune [OPTION ...]",
        description=(
            "Fine-tune a pretrained ResNet in three modes, beside the same network from scratch.\n"
            "Without options: five classes of Fashion-MNIST that the shipped network has not\n"
            "seen, ten images of each; nothing is downloaded."
        ),
        epilog=(
            "examples:\n"
            "  python -m fastops finetune\n"
            "  python -m fastops finetune --modes features,last:2 --seeds 5 --shots 5\n"
            "  python -m fastops finetune --data photos/ --arch resnet18 --weights resnet18.pth\n"
            "  python -m fastops finetune --backend both --modes full\n"
            "  python -m fastops finetune --backend both --modes full --profile\n"
            "  torchrun --nproc-per-node=2 -m fastops finetune"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to train on")
    what.add_argument(
        "--data",
        metavar="FOLDER",
        default="shipped",
        help="pictures in one sub-folder a class, or train/ and val/ of such; or 'shipped' (the "
        "default), or 'fashion-mnist' (all images, from Debian's package or the network)",
    )
    what.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="training images a class, 0 for all (default: 10 of the shipped data, else all)",
    )
    what.add_argument(
        "--test-fraction",
        type=float,
        metavar="X",
        help="share of each class kept for testing if FOLDER has no val/ (default: 0.2)",
    )
    what.add_argument(
        "--image-size", type=int, metavar="N", help="side in pixels (default: 28 small, else 224)"
    )
    what.add_argument(
        "--strict", action="store_true", help="refuse pictures that cannot be read, do not skip"
    )

    network = parser.add_argument_group("the network")
    network.add_argument(
        "--arch",
        metavar="NAME",
        help="small (ResNet-14, the default), any of torchvision's classification models "
        "(resnet18, ...), or timm/NAME; with --weights FILE alone it is told from the file",
    )
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint (.pt, .pth, .safetensors), none, or DEFAULT: the shipped one for "
        "small, torchvision's download for the others",
    )
    network.add_argument(
        "--dropout", type=float, metavar="P", help="before the last layer (default: 0)"
    )

    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument(
        "--modes",
        "--mode",
        type=split_list,
        metavar="LIST",
        help="of features (backbone frozen), last or last:N (last N stages too), full (backbone "
        "at a low rate), scratch; default: features,last,full,scratch",
    )
    recipe.add_argument(
        "--seeds", type=int, metavar="N", help="repetitions of each mode (default: 3)"
    )
    recipe.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run")
    recipe.add_argument(
        "--epochs", type=int, metavar="N", help="the same as passes over the training images"
    )
    recipe.add_argument("--batch-size", type=int, metavar="N", help="default: 50")
    recipe.add_argument(
        "--lr", type=float, metavar="X", help="rate of the head (default: 0.01 small, else 0.001)"
    )
    recipe.add_argument(
        "--backbone-rate", type=float, metavar="X", help="backbone's rate over --lr (default: 0.1)"
    )
    recipe.add_argument(
        "--warmup", type=float, metavar="X", help="share of steps the rate rises (default: 0.1)"
    )
    recipe.add_argument("--optimizer", metavar="NAME", help="adamw (default), adam, sgd, rmsprop")
    recipe.add_argument(
        "--weight-decay", type=float, metavar="X", help="not on biases and norms (default: 0.05)"
    )
    recipe.add_argument("--label-smoothing", type=float, metavar="P", help="default: 0.1")
    recipe.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="clip the gradient (default: no clipping)"
    )
    recipe.add_argument("--augment", action="store_true", help="random crops and flips")
    recipe.add_argument(
        "--schedule",
        metavar="NAME",
        help="together (default), or gradual: the head first, then one more stage after another",
    )
    recipe.add_argument(
        "--layer-decay",
        type=float,
        metavar="X",
        help="each stage at this times the rate of the one after it (default: 1)",
    )
    recipe.add_argument(
        "--freeze-norm", action="store_true", help="pretrained BatchNorm keeps its statistics"
    )
    recipe.add_argument("--l1", type=float, metavar="X", help="L1 penalty on weights (default: 0)")
    recipe.add_argument(
        "--mixup", type=float, metavar="A", help="mix images by Beta(A, A) (default: 0, no mixing)"
    )
    recipe.add_argument(
        "--ema", type=float, metavar="D", help="test and save averaged weights, of this decay"
    )
    recipe.add_argument(
        "--accumulate", type=int, metavar="N", help="compute a batch in N parts (default: 1)"
    )
    recipe.add_argument(
        "--early-stop", type=int, metavar="N", help="end after N of 8 evaluations without gain"
    )

    machine = parser.add_argument_group("how to run it")
    machine.add_argument(
        "--backend",
        metavar="NAME",
        help="fastops (default), torch (the same recipe on native ops) or both",
    )
    machine.add_argument("--amp", metavar="TYPE", help="off (default) or bf16")
    machine.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda, ...")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")

    output = parser.add_argument_group("what to leave")
    output.add_argument(
        "--out", metavar="FOLDER", help="new folder (default: runs/finetune-<date>-<time>)"
    )
    output.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run in FOLDER, with its own options"
    )
    output.add_argument(
        "--save-every", type=int, metavar="N", help="steps between saves (default: half a minute)"
    )
    output.add_argument("--logdir", metavar="FOLDER", help="write TensorBoard's files below FOLDER")
    output.add_argument(
        "--export", metavar="FILE", help="the best network for torch.export.load, needs torch only"
    )
    output.add_argument(
        "--profile", action="store_true", help="only say where the time of a step goes, by op"
    )
    output.add_argument("--dry-run", action="store_true", help="check and describe, do not train")
    output.add_argument("--quiet", action="store_true", help="print the closing table only")


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


def split_list(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run_finetune(options: argparse.Namespace) -> None:
    """Make a FineTuneConfig of the options that were given, run it and print the table."""
    import dataclasses

    import torch

    from fastops.finetune import ConfigError, FineTuneConfig, finetune, processes, profile, resume
    from fastops.finetune.text import for_terminal

    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"threads must be 1 or more, got {options.threads}")
        torch.set_num_threads(options.threads)
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(FineTuneConfig)
        if getattr(options, field.name) is not None
    }
    if options.resume is not None:
        flags = [
            name for name, value in given.items() if value != getattr(FineTuneConfig, name, None)
        ]
        flags += [name for name in ("dry_run", "profile") if getattr(options, name)]
        if flags:
            raise ConfigError(
                f"--resume takes the options of the run; leave out {', '.join(f'--{name}'.replace('_', '-') for name in flags)}"
            )
        result = resume(options.resume, show=not options.quiet)
    elif options.profile and not options.dry_run:
        print(profile(FineTuneConfig(**given)))
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
    output folder, said in one line. 130: Ctrl-C.
    """
    options = make_parser().parse_args(arguments)
    if options.command == "doctor":
        return doctor.main()
    try:
        from fastops.finetune import FineTuneError, processes
        from fastops.finetune.text import any_terminal
    except ModuleNotFoundError as error:
        print(
            f"{options.command} needs {error.name}: pip install torch-fastops[finetune]",
            file=sys.stderr,
        )
        return 2
    with any_terminal():
        try:
            if options.command == "predict":
                return run_predict(options)
            run_finetune(options)
        except FineTuneError as error:
            if processes.first():
                print(f"python -m fastops {options.command}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if processes.first() and options.command == "finetune":
                print(
                    "\ninterrupted; finished runs are reported in their folder, and "
                    "--resume FOLDER goes on",
                    file=sys.stderr,
                )
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
