"""What can go wrong, for callers: each message says what happened, where, and what to do about it."""

from __future__ import annotations

from typing import Any

import grpc


class RoboDualError(Exception):
    """Base of everything that this package raises on purpose, misuse of its API (TypeError, ValueError) excepted."""


class InvalidObservation(RoboDualError, ValueError):
    """An observation lacks a sensor that the model reads, or one is of the wrong type, shape or range."""


class InvalidRequest(RoboDualError, ValueError):
    """A service refused a request as malformed, out of bounds, or over its size limit; the same again would be too."""


class ServiceUnavailable(RoboDualError, ConnectionError):
    """A service could not be reached, or its queue stayed full, for as long as the call was repeated."""


class DeadlineExceeded(RoboDualError, TimeoutError):
    """A call took longer than its time limit. The same step can be asked for again."""


class NoConditioning(RoboDualError):
    """The specialist has no conditioning of this episode, or only one over its greatest age."""


class Unauthenticated(RoboDualError):
    """The token is missing, wrong, or not allowed to use this session; or TLS was not agreed on."""


class SessionLost(RoboDualError):
    """The specialist no longer knows the session and did not accept its recovery state. Reset to go on."""


class SessionConflict(RoboDualError):
    """The services are ahead of this client in its own session: somebody else uses the same session id."""


class ServiceMismatch(RoboDualError):
    """What answers at an address is another service, another model, or reads sensors unknown to this client."""


class ServiceFailed(RoboDualError):
    """A service failed inside, or gave an answer that is not one. The services' logs say more."""


class Failure(Exception):
    """One attempt of one call that failed, before it is decided whether to try again."""

    def __init__(self, code: grpc.StatusCode, details: str, where: str) -> None:
        super().__init__(f"{where}: {code.name}: {details}")
        self.code = code
        self.details = details
        self.where = where

    @classmethod
    def of(cls, error: Any, where: str) -> Failure:
        """From a `grpc.RpcError` of either API; `where` names service, method and address."""
        code, details = error.code(), error.details()
        if not isinstance(code, grpc.StatusCode):
            code = grpc.StatusCode.UNKNOWN
        return cls(code, str(details or "no details")[:500], where)

    @property
    def transient(self) -> bool:
        """Whether the same request may do better later, here or on another replica."""
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return not self.too_large
        # CANCELLED is never ours here: it is how a server that shuts down, or a broken stream, ends a call.
        return self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    @property
    def too_large(self) -> bool:
        # gRPC itself refuses messages over the limit, with the status that services use for a full queue.
        return self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in self.details

    @property
    def lacks_conditioning(self) -> bool:
        """Whether the specialist has none that is new enough, or waited in vain for one."""
        codes = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.code in codes and "conditioning" in self.details

    def error(self, attempts: int = 1, seconds: float = 0.0) -> RoboDualError:
        """The exception for the caller, after so many attempts in so many seconds."""
        kind, advice = _meaning(self)
        tried = f" after {attempts} attempts in {seconds:.1f} s" if attempts > 1 else ""
        return kind(f"{self.where}: {self.details} ({self.code.name}{tried}). {advice}")


_MEANINGS = {
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidRequest, "Correct the named field."),
    grpc.StatusCode.OUT_OF_RANGE: (InvalidRequest, "Correct the named field."),
    grpc.StatusCode.UNAVAILABLE: (
        ServiceUnavailable,
        "Check that the service runs (`robodual doctor`) and that its address and TLS settings are right.",
    ),
    grpc.StatusCode.CANCELLED: (ServiceUnavailable, "The service is shutting down or dropped the connection."),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        DeadlineExceeded,
        "Ask for the step again, or give more time (timeouts=Timeouts(...)).",
    ),
    grpc.StatusCode.NOT_FOUND: (SessionLost, "Reset to start the episode anew."),
    grpc.StatusCode.FAILED_PRECONDITION: (
        SessionConflict,
        "Another client, or an earlier run, used this session id: take another one, or reset(..., episode=N) past it.",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (Unauthenticated, "Give the service's token: token=..."),
    grpc.StatusCode.PERMISSION_DENIED: (Unauthenticated, "Use the token that opened this session, or another session."),
    grpc.StatusCode.UNIMPLEMENTED: (ServiceMismatch, "Check that generalist and specialist addresses are not swapped."),
}


def _meaning(failure: Failure) -> tuple[type[RoboDualError], str]:
    if failure.too_large:
        return InvalidRequest, "Send smaller frames, or raise the service's message size limit."
    if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ServiceUnavailable, "The service is overloaded: fewer clients, more replicas, or a larger queue."
    if failure.lacks_conditioning:
        return NoConditioning, "Check the generalist and Redis: no recent conditioning reaches the specialist."
    return _MEANINGS.get(failure.code, (ServiceFailed, "The service's log says more."))
