"""The command `coterie`, also `python -m coterie`."""

import os
import sys

from coterie.errors import CoterieError
from coterie.startup import check_machine


def main() -> None:
    """Name an unsuitable machine at once, in one line; otherwise hand over to the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  until the end
    try:
        check_machine()
        from coterie import cli

        cli.main()
    except CoterieError as error:
        print(f"coterie: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # before or after the command line would catch it
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
