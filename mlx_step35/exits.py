"""How every command ends: one line on stderr for what went wrong, and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

from mlx_step35.errors import CapacityError, RequestError, Step35Error

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run_command(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do a command's work and return its exit code: what it returned, 0 for nothing.

    A caller's mistake ends with 2, any other error of this package or of the system with 1, Ctrl-C with 130.
    What is none of these is a bug and keeps its traceback.
    """
    try:
        code = work() or 0
        # Here rather than at exit, where a reader that has left would end in a message of the interpreter.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say(interrupted, EXIT_INTERRUPTED)
    except (RequestError, CapacityError) as error:
        return _say(f"error: {error}", EXIT_USAGE)
    except Step35Error as error:
        return _say(f"error: {error}", EXIT_FAILURE)
    except BrokenPipeError:
        # Whoever read the output has what it wanted; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room and run the same command again" if is_full else ""
        return _say(f"error: {place}{error.strerror or error}{advice}", EXIT_FAILURE)


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
