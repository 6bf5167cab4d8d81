"""Errors that a user can mend; the command line prints their message and exits with code 1."""


class OneRecError(Exception):
    """A problem with the user's input, files or machine, told in one message."""


class DataError(OneRecError):
    """A data file that cannot be used: names the file, the column, the row and what was wanted."""


class Interrupted(OneRecError):
    """Ctrl-C or SIGTERM, after what was done had been saved; the command line exits with 130."""
