"""Fine-tuning a pretrained network on one's own images, as a recipe to run or to copy from.

>>> from fastops.finetune import FineTuneConfig, finetune
>>> result = finetune(FineTuneConfig(data="photos"), show=True)
>>> print(result)

The command `python -m fastops finetune` only turns its arguments into a FineTuneConfig.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import FineTuneConfig
from .errors import ConfigError, DataError, FineTuneError, OutputError, WeightsError

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate
    from .experiment import Result, finetune, resume
    from .export import export_network, export_program
    from .predict import Answer, Classifier, load_classifier
    from .profiling import profile
    from .run import Run

__all__ = [
    "Answer",
    "Classifier",
    "ConfigError",
    "DataError",
    "Evaluation",
    "FineTuneConfig",
    "FineTuneError",
    "OutputError",
    "Result",
    "Run",
    "WeightsError",
    "evaluate",
    "export_network",
    "export_program",
    "finetune",
    "load_classifier",
    "profile",
    "resume",
]

MODULES = {
    "evaluation": ("Evaluation", "evaluate"),
    "experiment": ("Result", "finetune", "resume"),
    "export": ("export_network", "export_program"),
    "predict": ("Answer", "Classifier", "load_classifier"),
    "profiling": ("profile",),
    "run": ("Run",),
}
"""Where the names are that need torchvision, matplotlib and tqdm: imported when asked for, so that
the command can say that they are missing."""


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
