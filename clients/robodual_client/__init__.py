"""Client of RoboDual Serve: needs NumPy, grpcio and protobuf only."""

__version__ = "0.1.0"
