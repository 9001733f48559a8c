"""The one error that a user's own input causes, and how commands show it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that cannot be used. The message is one line naming the file, line, key or flag.

    Commands print it without a traceback and exit with code 2.
    """


def run_command(main: Callable[[list[str]], None]) -> int:
    """Run a command on sys.argv. Returns its exit code: 0, 2 for a UserError, 130 for Ctrl-C."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
