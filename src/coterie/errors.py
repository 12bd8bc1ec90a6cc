"""Every error that Coterie raises on purpose.

CoterieError
├── UsageError      the caller asked for something that makes no sense (exit code 2)
├── ModelError      a model file, tokenizer or chat template is damaged or not supported (3)
├── PlanError       the model does not fit the memory or the device (4)
├── FetchError      a model could not be fetched or its checksum differs (5)
└── UnitError       a compute unit failed or cannot run here (6)

A message says what is wrong, where, and what to do, in one line. The command line prints it
and exits with the class's code; a traceback means a defect of ours.
"""


class CoterieError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(CoterieError):
    """The caller asked for something that makes no sense."""

    exit_code = 2


class ModelError(CoterieError):
    """A model file, its tokenizer or its chat template is damaged or not supported."""

    exit_code = 3


class PlanError(CoterieError):
    """The model does not fit the memory or the device it was planned for."""

    exit_code = 4


class FetchError(CoterieError):
    """A model could not be fetched, or what came is not what was expected."""

    exit_code = 5


class UnitError(CoterieError):
    """A compute unit failed, or cannot run on this machine."""

    exit_code = 6
