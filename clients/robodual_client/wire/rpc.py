"""gRPC stubs and handlers for the services of `robodual.v1`, built from their descriptors."""

from __future__ import annotations

from typing import Any, Callable, Mapping

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from robodual_client import wire

GENERALIST = "robodual.v1.Generalist"
SPECIALIST = "robodual.v1.Specialist"


class Stub:
    """One attribute per method of `service` (GENERALIST or SPECIALIST), callable as grpc's own stubs are.

    `channel` is a `grpc.Channel` or a `grpc.aio.Channel`. Requests may be given as messages, or
    already serialised, in one or several pieces.
    """

    def __init__(self, channel: Any, service: str) -> None:
        for method, kind in _methods(service):
            _, response = _classes(method)
            call = getattr(channel, kind)(
                f"/{service}/{method.name}",
                request_serializer=_serialize,
                response_deserializer=response.FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the service has no method {name}")


def handler(
    service: str, servicer: object, readers: Mapping[str, Callable[[bytes], Any]] | None = None
) -> grpc.GenericRpcHandler:
    """A handler for `server.add_generic_rpc_handlers` that answers each method with the servicer's one of that name.

    `readers` make requests of bytes, for the methods that are to get something else than messages.
    """
    handlers = {}
    for method, kind in _methods(service):
        request, response = _classes(method)
        handlers[method.name] = getattr(grpc, f"{kind}_rpc_method_handler")(
            getattr(servicer, method.name),
            request_deserializer=(readers or {}).get(method.name, request.FromString),
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service, handlers)


def _serialize(request: Message | bytes | list[bytes | memoryview]) -> bytes:
    if isinstance(request, list):
        return b"".join(request)
    return request if isinstance(request, bytes) else request.SerializeToString()


def _methods(service: str) -> list[tuple[Any, str]]:
    names = {False: "unary", True: "stream"}
    methods = wire.POOL.FindServiceByName(service).methods
    return [(method, f"{names[method.client_streaming]}_{names[method.server_streaming]}") for method in methods]


def _classes(method: Any) -> tuple[Any, Any]:
    return message_factory.GetMessageClass(method.input_type), message_factory.GetMessageClass(method.output_type)
