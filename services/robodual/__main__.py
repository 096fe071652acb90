"""What the command `robodual` runs: its imports take a second, in which Ctrl-C is no traceback."""

import os
import signal


def main() -> None:
    """Runs the command line."""
    if os.getpid() == 1:  # a container's first process, which no signal ends that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        from robodual import cli
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
