"""The one exception that stands for a mistake of the user's, not of the program's."""


class UserError(ValueError):
    """A wrong value, file or combination that the user can mend.

    The message is one line: the value, what was expected, and the remedy. Scripts print it
    without a traceback and exit with code 2 (see `utils.cli.run`).
    """
