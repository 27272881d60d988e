"""ZMQ's sockets as far as the product uses them, in one process, with a network between them that does what it should
not: what a seed says of it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import zmq

LATENCY = 0.0005  # seconds, at most, where nothing goes wrong
MOMENT = 1e-6  # seconds: no two messages of a lane arrive at once
MOST_REMEMBERED = 200  # messages of a lane, to be sent once more
Clock = Callable[[], float]


@dataclass
class Faults:
    """How often a message meets each; 0: never."""

    drop: float = 0.0
    duplicate: float = 0.0
    overtake: float = 0.0  # those behind it come first
    delay: float = 0.0  # with all behind it
    cut: float = 0.0
    haunt: float = 0.0  # an earlier one comes once more, perhaps of an earlier process
    break_off: float = 0.0  # a connection is made anew in silence, without what was on its way

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        rates = [rng.choice((0.003, 0.01, 0.03)) if rng.random() < 0.5 else 0.0 for _ in fields(cls)]
        return cls(*rates)


class Lane(NamedTuple):
    """From one process to another, one way."""

    address: str
    identity: bytes  # of the DEALER
    is_up: bool  # to the ROUTER


class SimSocket:
    """A ROUTER or a DEALER."""

    def __init__(self, network: Network, kind: int) -> None:
        self._network, self.kind = network, kind
        self.identity, self.address = b"", ""
        self.arrived: deque[list[bytes]] = deque()
        self.on_readable: Callable[[], Any] | None = None
        self.is_closed = False

    def setsockopt(self, option: int, value: Any) -> None:
        if option == zmq.IDENTITY:
            self.identity = value

    def getsockopt(self, option: int) -> int:
        assert option == zmq.EVENTS
        return int(bool(self.arrived))  # POLLIN

    def bind(self, address: str) -> None:
        self.address = address
        self._network.bound(self)

    def connect(self, address: str) -> None:
        self.address = address
        self._network.connected(self)

    def send_multipart(self, frames: Sequence[Any], flags: int = 0) -> None:
        if self.is_closed:
            return  # of a process that was killed
        message = [memoryview(frame).tobytes() for frame in frames]
        if self.kind == zmq.DEALER:
            self._network.send(Lane(self.address, self.identity, True), message, self)
            return
        identity, *rest = message
        if not self._network.is_there(self.address, identity):
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._network.send(Lane(self.address, identity, False), rest, self)

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        return self.arrived.popleft()

    def push(self, frames: list[bytes]) -> None:
        self.arrived.append(frames)
        if self.on_readable is not None:
            self.on_readable()

    def close(self, linger: int | None = None) -> None:
        self.is_closed, self.on_readable = True, None
        self._network.closed(self)


class SimContext:
    """A process's sockets, which go with it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._sockets: list[SimSocket] = []

    def socket(self, kind: int) -> SimSocket:
        self._sockets.append(SimSocket(self._network, kind))
        return self._sockets[-1]

    def destroy(self, linger: int | None = None) -> None:
        for socket in self._sockets:
            socket.close()


@dataclass
class _State:
    """Of a lane."""

    clear_at: float = 0.0  # when the last message arrives, which the next one follows
    num_breaks: int = 0
    history: deque[list[bytes]] = field(default_factory=lambda: deque(maxlen=MOST_REMEMBERED))


class Network:
    """Carries messages, and decides by its seed which of them how. Addresses in ``is_faulty`` suffer, others do not."""

    def __init__(
        self,
        loop: Any,
        rng: random.Random,
        faults: Faults,
        is_faulty: Callable[[str], bool],
        tell: Callable[..., None],
    ) -> None:
        self._loop, self._rng, self.faults, self._is_faulty, self._tell = loop, rng, faults, is_faulty, tell
        self.silent_until = 0.0  # whatever is sent before is lost
        self._routers: dict[str, SimSocket] = {}
        self._dealers: dict[tuple[str, bytes], SimSocket] = {}
        self._held: dict[str, list[tuple[Lane, list[bytes], SimSocket]]] = {}  # where nobody listens yet
        self._states: dict[Lane, _State] = {}

    def heal(self) -> None:
        """What is on its way may still come late; nothing else goes wrong from now on."""
        self.faults, self.silent_until = Faults(), 0.0

    # What sockets do

    def bound(self, router: SimSocket) -> None:
        self._routers[router.address] = router
        for lane, message, sender in self._held.pop(router.address, []):
            if not sender.is_closed or self._rng.random() < 0.5:
                router.push([lane.identity, *message])

    def connected(self, dealer: SimSocket) -> None:
        self._dealers[dealer.address, dealer.identity] = dealer

    def closed(self, socket: SimSocket) -> None:
        if self._routers.get(socket.address) is socket:
            del self._routers[socket.address]
        if self._dealers.get((socket.address, socket.identity)) is socket:
            del self._dealers[socket.address, socket.identity]

    def is_there(self, address: str, identity: bytes) -> bool:
        return (address, identity) in self._dealers

    def send(self, lane: Lane, message: list[bytes], sender: SimSocket) -> None:
        state, rng, now = self._states.setdefault(lane, _State()), self._rng, self._loop.time()
        is_faulty, faults = self._is_faulty(lane.address), self.faults
        at = max(state.clear_at + MOMENT, now + rng.random() * LATENCY)

        def happens(rate: float, what: str) -> bool:
            if not is_faulty or rate == 0.0 or rng.random() >= rate:
                return False
            self._tell("network", what, lane, message[0].hex())
            return True

        if happens(faults.haunt, "haunt") and state.history:
            self._carry(lane, rng.choice(state.history), sender, now + rng.expovariate(2.0))
        state.history.append(message)
        if happens(faults.break_off, "break"):
            for way in (True, False):
                self._states.setdefault(lane._replace(is_up=way), _State()).num_breaks += 1
        if happens(faults.drop, "drop") or (is_faulty and now < self.silent_until):
            return
        if happens(faults.duplicate, "duplicate"):
            self._carry(lane, message, sender, at + rng.choice((0.0, rng.random(), rng.expovariate(0.3))))
        if happens(faults.cut, "cut"):
            message = _cut(message, rng)
        if happens(faults.overtake, "overtake"):
            self._carry(lane, message, sender, at + rng.choice((2 * LATENCY, 0.05 * rng.random(), rng.random())))
            return
        if happens(faults.delay, "delay"):
            at += rng.expovariate(0.5)
        state.clear_at = at
        self._carry(lane, message, sender, at)

    def _carry(self, lane: Lane, message: list[bytes], sender: SimSocket, at: float) -> None:
        num_breaks = self._states[lane].num_breaks
        receiver = None if lane.is_up else self._dealers.get((lane.address, lane.identity))

        def arrive() -> None:
            if self._states[lane].num_breaks == num_breaks:
                self._arrive(lane, message, sender, receiver)

        self._loop.call_at(at, arrive)

    def _arrive(self, lane: Lane, message: list[bytes], sender: SimSocket, receiver: SimSocket | None) -> None:
        is_late = sender.is_closed or (receiver is not None and receiver.is_closed)
        if is_late and self._rng.random() < 0.5:
            return  # it went with its socket
        # What a supervisor is told has process numbers in it.
        told = message if self._is_faulty(lane.address) else message[:1]
        self._tell("arrives", lane, [frame.hex() for frame in told])
        if lane.is_up:
            router = self._routers.get(lane.address)
            if router is None:
                self._held.setdefault(lane.address, []).append((lane, message, sender))
            else:
                router.push([lane.identity, *message])
        elif (dealer := self._dealers.get((lane.address, lane.identity))) is not None:
            dealer.push(list(message))


def _cut(message: list[bytes], rng: random.Random) -> list[bytes]:
    if len(message) > 1 and rng.random() < 0.3:
        return message[: rng.randrange(1, len(message))]
    index = rng.choice([index for index, frame in enumerate(message) if frame])
    frame = message[index]
    length = rng.randrange(len(frame))
    if rng.random() < 0.5:
        length -= length % 8  # whole numbers
    return [*message[:index], frame[:length], *message[index + 1 :]]
