"""The one error type that means "what the user gave is wrong"."""


class InputError(ValueError):
    """A config, file, label or checkpoint that cannot be used as given.

    Its message is one line that names the file, key or label and what was expected; the scripts print it without a
    traceback and exit with 2.
    """
