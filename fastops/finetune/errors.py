"""What can go wrong for reasons outside the program: the command prints no traceback for these."""


class FineTuneError(Exception):
    """Base of every error that the user can put right."""


class ConfigError(FineTuneError, ValueError):
    """An option has a value that cannot be used."""


class DataError(FineTuneError):
    """A folder or an image is missing, empty, damaged or of the wrong shape."""


class WeightsError(FineTuneError):
    """A checkpoint is missing, damaged, of another architecture or cannot be downloaded."""


class OutputError(FineTuneError, OSError):
    """The run's folder or a file in it cannot be written."""
