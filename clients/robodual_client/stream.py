"""A stream of actions, over gRPC's blocking API, whose streams have no time limit for an answer."""

from __future__ import annotations

import queue
import threading
from typing import Any, Iterator

import grpc
from google.protobuf.message import Message

from robodual_client import wire
from robodual_client.calls import Call
from robodual_client.errors import Failure
from robodual_client.wire import rpc
from robodual_client.worker import JOIN


class ActStream:
    """An open ActStream. `exchange` is the caller's, and touches queues alone; the rest is the worker's."""

    def __init__(self, stub: rpc.Stub, metadata: tuple[tuple[str, str], ...], where: str) -> None:
        self._requests: queue.SimpleQueue[Message | bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[wire.ActResponse | Failure] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self._call: Any = stub.ActStream(self._take(), metadata=metadata)
        self._reader = threading.Thread(target=self._read, args=(where,), name="robodual-stream", daemon=True)
        self._reader.start()

    def exchange(self, call: Call) -> wire.ActResponse:
        """The answer to the next request. After a Failure, or an interruption, the stream is of no more use."""
        self._requests.put(call.request)
        try:
            answer = self._answers.get(timeout=call.timeout)
        except queue.Empty:
            details = f"no answer within {call.timeout:g} s"
            raise Failure(grpc.StatusCode.DEADLINE_EXCEEDED, details, call.where) from None
        if isinstance(answer, Failure):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the call and waits for its threads: one that outlived the interpreter could keep it from exiting."""
        self._requests.put(None)
        self._call.cancel()
        self._reader.join(JOIN)
        if self._sender is not None:
            self._sender.join(JOIN)

    def _take(self) -> Iterator[Message | bytes]:
        self._sender = threading.current_thread()
        while True:
            request = self._requests.get()
            if request is None:
                return
            yield request

    def _read(self, where: str) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
        except grpc.RpcError as error:
            self._answers.put(Failure.of(error, where))
        else:
            self._answers.put(Failure(grpc.StatusCode.UNAVAILABLE, "the service ended the stream", where))
