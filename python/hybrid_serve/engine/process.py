"""The engine process: loads the model, joins the server, runs the loop. Knows the order of a start-up, no step."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import msgspec
import zmq

from .. import __version__, _core, flight
from ..config import Config
from ..curve import Gate, read_key_file
from ..errors import StartupError, lack_of_memory
from ..heartbeat import STACKS_SIGNAL, EnginePhase, Heartbeat, max_watched_ids
from ..parallel.lockstep import Lockstep
from ..sockets import bind_router, connect_dealer
from ..wire import PROTOCOL_VERSION, EngineFacts, Hello, Kind, Status, engine_identity, pack
from .arenas import SharedArena
from .executor import Executor, ExecutorFacts
from .inbox import Inbox
from .joint import JointExecutor, JointInbox, SteppingExecutor
from .loop import EngineLoop, Source
from .outbox import Around, Outbox
from .peers import Peers
from .phases import Phases
from .probation import Probation
from .watched import WatchedExecutor

log = logging.getLogger(__name__)
PROGRESS_INTERVAL = 0.1  # seconds
PR_SET_PDEATHSIG = 1


def main(
    config: Config,
    *,
    index: int,
    num_clients: int,
    control_address: str,
    data_address: str,
    load: str,
    heartbeat_fd: int,
    stacks_path: str,
    cpu_threads: int,
    key_file: str,
    lockstep_addresses: Sequence[str] = (),
    lockstep_place: int = 0,
) -> None:
    """Returns when the supervisor says stop. ``load``: "module:function", an ``executor.Load``. ``key_file``: where
    ``data_address`` is of a network, whose port the system picks. ``lockstep_addresses``: see ``Lockstep``; none: this
    engine steps as it likes. Raises StartupError."""
    die_with_parent()
    dump_stacks_on_signal(stacks_path)
    heartbeat = Heartbeat(heartbeat_fd, max_watched_ids(config))
    threading.Thread(target=heartbeat.pulse_forever, daemon=True, name="pulse").start()
    # torch reads this when it is first imported: weights and KV cache on 2 MiB pages, which the kernels' long reads and
    # scattered blocks pay for in fewer address misses (some 8 % of a decode step of 16 sequences).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    context = zmq.Context()
    cache_bytes = 0
    try:
        control = connect_dealer(context, control_address, engine_identity(index))
        control.send_multipart(
            pack(Kind.HELLO, Hello("engine", index, os.getpid(), PROTOCOL_VERSION, __version__, config.digest()))
        )
        config = replace(config, engine=replace(config.engine, cpu_threads=cpu_threads))
        # Bound before the model is loaded: API servers connect meanwhile, and what they send waits.
        gate = Gate(context, read_key_file(Path(key_file))) if key_file else None
        data = bind_router(context, data_address, gate)
        peers = Peers(data, num_clients)
        progress = Progress(control, data.getsockopt_string(zmq.LAST_ENDPOINT) if gate is not None else "")
        module, _, function = load.partition(":")
        executor: Executor = getattr(import_module(module), function)(config, progress)
        progress("allocating", 0.0)
        facts = executor.allocate()
        cache_bytes = facts.cache_bytes
        for what, num_bytes in facts.memory:
            log.info("memory: %8.2f GiB  %s", num_bytes / 2**30, what)
        core = make_core(config, executor, facts, num_clients)
        core.record(heartbeat.recording, flight.NUM_STEPS)
        probation = Probation(heartbeat.try_out)
        inbox = Inbox(
            peers,
            control,
            heartbeat,
            probation,
            longest_prompt=min(facts.max_model_len, facts.num_blocks * config.cache.block_size) - 1,
            max_num_seqs=most_running(config, facts),
            max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        )
        collect_garbage_rarely()
        heartbeat.enter(EnginePhase.IDLE)
        progress.ready(engine_facts(config, facts), facts.notes)
        source: Source = inbox
        if lockstep_addresses:
            lockstep = Lockstep(context, lockstep_addresses, lockstep_place)
            executor = joint = JointExecutor(cast(SteppingExecutor, executor), lockstep)
            source = JointInbox(inbox, joint, lockstep)
        watched = WatchedExecutor(executor, core, heartbeat)

        def around() -> Around:
            return Around(inbox.may_run, inbox.num_dropped, gate.num_refused if gate is not None else 0)

        phases = Phases()
        outbox = Outbox(peers, probation, watched.gaps, phases, around)
        EngineLoop(core, watched, source, outbox, phases).run()
    except Exception as error:
        if (lack := lack_of_memory(f"engine {index}", error, cache_bytes)) is not None:
            raise lack from error
        raise
    finally:
        context.destroy(linger=0)


def most_running(config: Config, facts: ExecutorFacts) -> int:
    """Requests that may run at a time."""
    return min(config.scheduler.max_num_seqs or facts.max_num_seqs, facts.max_num_seqs)


def make_core(config: Config, executor: Executor, facts: ExecutorFacts, num_clients: int = 1) -> _core.Scheduler:
    """The scheduler and the arenas it shares with the executor. Raises StartupError if the capacities contradict."""
    try:
        core_config = _core.Config(
            num_blocks=facts.num_blocks,
            block_size=config.cache.block_size,
            max_num_seqs=most_running(config, facts),
            max_num_batched_tokens=facts.max_batched_tokens,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            num_clients=num_clients,
            depth=executor.depth,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            num_host_blocks=facts.num_host_blocks,
            swap_cost=facts.swap_cost,
            hash_key=secrets.token_bytes(16),  # nobody can construct prompts whose blocks collide
            decode_sizes=facts.pad_sizes[0],
            mixed_seq_sizes=facts.pad_sizes[1],
            mixed_token_sizes=facts.pad_sizes[2],
            min_shared_tokens=facts.min_shared_tokens,
        )
    except ValueError as error:
        raise StartupError(
            "HS-E027", "the capacities do not work together", str(error), "change that option"
        ) from error
    num_bytes, layout = _core.batch_layout(core_config)
    arenas = [SharedArena.of_size(num_bytes) for _ in range(executor.depth + 1)]
    executor.bind(arenas, layout)
    return _core.Scheduler(core_config, arenas)


def engine_facts(config: Config, facts: ExecutorFacts) -> EngineFacts:
    return EngineFacts(
        facts.vocab_size,
        facts.max_model_len,
        config.cache.block_size,
        facts.num_blocks,
        facts.dtype,
        facts.device,
        facts.cache_bytes,
    )


class Progress:
    """Start-up phases as STATUS frames; knows the clock and the supervisor's socket only."""

    def __init__(self, control: zmq.Socket[bytes], address: str = "") -> None:
        self._control, self._address = control, address
        self._phase, self._began, self._next = "", 0.0, 0.0

    def __call__(self, phase: str, share: float) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._next = phase, now, now
        if now >= self._next or share >= 1:
            self._next = now + PROGRESS_INTERVAL
            self._send(Status(phase, share, seconds=now - self._began))

    def ready(self, facts: EngineFacts, notes: tuple[str, ...]) -> None:
        seconds = time.monotonic() - self._began
        self._send(Status("ready", 1.0, "; ".join(notes), seconds, facts))

    def _send(self, status: Status) -> None:
        self._control.send_multipart(pack(Kind.STATUS, msgspec.structs.replace(status, address=self._address)))


def dump_stacks_on_signal(path: str) -> None:
    """``STACKS_SIGNAL`` writes every thread's Python stack there, also while a step in C++ or CUDA does not return."""
    faulthandler.register(STACKS_SIGNAL, file=open(path, "w"), all_threads=True)  # noqa: SIM115  open as long as we live


def die_with_parent() -> None:
    """Linux: the kernel kills this process when the one that started it dies, whatever this one is doing then."""
    if not sys.platform.startswith("linux"):
        return  # the end of the pipe to the parent, which every child watches, says the same a little later
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log.warning("PR_SET_PDEATHSIG failed: %s", os.strerror(ctypes.get_errno()))


def collect_garbage_rarely() -> None:
    """What start-up made stays out of every later collection; a step makes no cycles, so the rest can wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
