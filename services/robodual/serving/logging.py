"""Structured logs on standard error: one line an event, for people or as JSON."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor

from robodual.serving import fields
from robodual.serving.settings import Settings


def configure(settings: Settings) -> None:
    """Sends this process's logs, those of libraries included, through structlog in the format of the settings.

    A request's session, episode and step are on each of its lines, and what is bound with `structlog.contextvars`.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _label,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    if settings.log_format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # The plain formatter: others print local variables, which may be secrets.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last], foreign_pre_chain=shared
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("robodual").setLevel(settings.log_level.upper())


def _label(logger: object, method: str, event: EventDict) -> EventDict:
    return {**fields.labels(), **event}
