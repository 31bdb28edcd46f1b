"""How a command line ends: 0, or one sentence about what is wrong and 2."""

import sys
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run main(argv). What a user can mend (ValueError, OSError) becomes a sentence on stderr."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
