"""CALVIN evaluation: the published sequences, instructions, oracle and protocol, for any environment and policy."""

from robodual_client.calvin.options import EvaluationError, Options
from robodual_client.calvin.results import Results
from robodual_client.calvin.runner import evaluate

__all__ = ["EvaluationError", "Options", "Results", "evaluate"]
