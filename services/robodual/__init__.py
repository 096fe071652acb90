"""RoboDual Serve's services: generalist, specialist, and the conditioning store between them."""

__version__ = "0.1.0"
