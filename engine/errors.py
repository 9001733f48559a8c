"""The one error that a user's own input causes."""


class UserError(ValueError):
    """Input that cannot be used. The message is one line naming the file, line, key or flag.

    Commands print it without a traceback and exit with code 2.
    """
