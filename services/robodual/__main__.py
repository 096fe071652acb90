"""What the command `robodual` runs: its imports take a second, in which Ctrl-C is no traceback."""

import os
import signal


def main() -> None:
    """Runs the command line."""
    # The first process of a container, which this may be, ignores a signal that has no handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        from robodual import cli
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
