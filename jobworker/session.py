"""A worker's connection with a server: frames in, batches out. It knows no attempt."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import protocol
from protocol import VERSION_2, Hello, Log

log = logging.getLogger("worker")


class Socket(Protocol):
    """As much of a WebSocket connection as a session needs. Raises ConnectionClosed."""

    @property
    def subprotocol(self) -> str | None: ...
    @property
    def response(self) -> Any: ...
    async def send(self, data: bytes, /) -> None: ...
    async def close(self, code: int, reason: str) -> None: ...
    def __aiter__(self) -> AsyncIterator[str | bytes]: ...


class Session:
    """One connection with a server: what is sent goes out in order, a batch at a time."""

    def __init__(self, socket_: Socket) -> None:
        self._socket = socket_
        self.version = 2 if socket_.subprotocol == VERSION_2 else 1
        headers = socket_.response.headers if socket_.response else {}
        self.server_id: str | None = headers.get(protocol.SERVER_HEADER)
        self.knows_readings = protocol.READINGS_HEADER in headers
        self.greeted = False
        self._outbox: deque[protocol.FromWorker] = deque()
        self._filled = asyncio.Event()

    @property
    def busy(self) -> bool:
        return len(self._outbox) > 0

    def send(self, message: protocol.FromWorker) -> None:
        self._outbox.append(message)
        self._filled.set()

    async def run(self, receive: Callable[[protocol.FromServer], None]) -> None:
        """Write what is sent, and hand over each message that comes, until the connection ends."""
        writing = asyncio.ensure_future(self._write())
        try:
            async for data in self._socket:
                for message in protocol.decode_from_server(data, self.version):
                    receive(message)
        except protocol.ProtocolError as error:
            log.error("the server sent what can't be read: %s", error)
            await self._socket.close(1007, str(error)[:100])
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._outbox:
                await self._socket.send(self._next_frame())

    def _next_frame(self) -> bytes:
        if self.version == 1:
            return protocol.encode(self._outbox.popleft())
        batch: list[protocol.FromWorker] = []
        size = 0
        while self._outbox and size < protocol.BATCH_BYTES:
            if isinstance(self._outbox[0], Hello) and batch:  # a Hello has a frame of its own
                break
            message = self._outbox.popleft()
            if isinstance(message, Hello):
                return protocol.encode(message)
            size += len(message.data) if isinstance(message, Log) else 100
            batch.append(message)
        return protocol.encode_batch(batch)
