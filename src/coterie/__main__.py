"""The command `coterie`, also `python -m coterie`."""

import sys

from coterie.errors import CoterieError
from coterie.startup import check_machine


def main() -> None:
    """Name an unsuitable machine at once, in one line; otherwise hand over to the command line."""
    try:
        check_machine()
    except CoterieError as error:
        print(f"coterie: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

    from coterie import cli

    cli.main()


if __name__ == "__main__":
    main()
