"""The one exception that means a mistake of the user, not of the program."""


class UserError(ValueError):
    """A wrong value, file or combination that the user can correct.

    The message is one line: the value, what was expected, and the remedy. Scripts print it
    without a traceback and exit with code 2 (see `utils.cli.run`).
    """
