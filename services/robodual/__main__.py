"""What the command `robodual` runs: its imports take a second, in which Ctrl-C is no traceback."""


def main() -> None:
    """Runs the command line."""
    try:
        from robodual import cli
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
