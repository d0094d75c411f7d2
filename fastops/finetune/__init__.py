"""Fine-tuning a pretrained ResNet on one's own images, as a recipe to run or to copy from.

>>> from fastops.finetune import FineTuneConfig, finetune
>>> result = finetune(FineTuneConfig(modes=("features", "full"), seeds=1), show=True)
>>> print(result)

The command `python -m fastops finetune` only turns its arguments into a FineTuneConfig.
"""

from .config import FineTuneConfig
from .errors import ConfigError, DataError, FineTuneError, OutputError, WeightsError
from .experiment import Result, finetune, resume
from .predict import Classifier, export_program, load_classifier
from .profiling import profile
from .run import Run

__all__ = [
    "Classifier",
    "ConfigError",
    "DataError",
    "FineTuneConfig",
    "FineTuneError",
    "OutputError",
    "Result",
    "Run",
    "WeightsError",
    "export_program",
    "finetune",
    "load_classifier",
    "profile",
    "resume",
]
