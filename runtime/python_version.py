"""One line instead of a traceback where Python is too old.

A command calls `require_python` before any import that needs the new version. This file and the
first lines of the commands use no syntax newer than Python 3.8.
"""

import sys

OLDEST = (3, 11)


def require_python(version=sys.version_info):
    """Exit with code 2 and one line if `version` is older than OLDEST."""
    if tuple(version[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        current = ".".join(map(str, version[:3]))
        sys.stderr.write(
            "error: Python " + needed + " or newer is needed, this is Python " + current + " ("
            + sys.executable + "); make a virtual environment with python" + needed + "\n")
        sys.exit(2)
