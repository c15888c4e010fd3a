"""The one exception that says that what the user gave cannot work."""


class ConfigurationError(ValueError):
    """What was asked for does not fit the model, the data or the Trainer.

    Its message is one line that names what was given, what was expected and what is available. The command
    line prints that line and exits with code 2; everywhere else it is a ``ValueError``.

    Example:
        >>> raise ConfigurationError("keep_rate is 1.5, expected a number above 0 and at most 1.")
        Traceback (most recent call last):
        ...
        lightning_bsr._errors.ConfigurationError: keep_rate is 1.5, expected a number above 0 and at most 1.
    """
