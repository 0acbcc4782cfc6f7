"""How fast is a channel between two nodes on loopback: two processes, CURVE, 256 KiB frames.

    python tests/bench/channel.py [MEGABYTES]

Both ends, and the encryption on both sides, share this machine's cores.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import socket
import sys
import time
from multiprocessing.connection import Connection

from agent.channel.channels import Channels
from agent.https import HttpsClient, unverified_context
from common import keys
from common.commands import Route

MIB = 2**20


def main() -> int:
    """Measure, and print megabytes per second, seconds of CPU, and the largest size of both processes."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    source, target = keys.generate(), keys.generate()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here, there = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(target, source.public, port, there))
    receiver.start()
    begun = time.monotonic()
    asyncio.run(_send(source, target.public, port, size))
    seconds = time.monotonic() - begun
    received, cpu, resident = here.recv()
    receiver.join()
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{received / seconds / 1e6:.0f} MB/s ({received / MIB:.0f} MiB in {seconds:.2f} s)")
    print(f"sender:   {own.ru_utime + own.ru_stime:.2f} s of CPU, {own.ru_maxrss / 1024:.0f} MiB")
    print(f"receiver: {cpu:.2f} s of CPU, {resident / 1024:.0f} MiB")
    return 0 if received == size * MIB else 1


def _channels(pair: keys.KeyPair, port: int) -> Channels:
    return Channels(pair, HttpsClient("https://127.0.0.1:1", unverified_context()), port)


async def _send(pair: keys.KeyPair, peer: str, port: int, size: int) -> None:
    channels = _channels(pair, 0)
    chunk = bytes(MIB)
    route = Route("bench", 0, "receiver", peer, "token", address=f"tcp://127.0.0.1:{port}")
    async with channels.open(route, True) as channel:
        for _ in range(size):
            await channel.write(chunk)
        await channel.end()
        await channel.read()
    await channels.close()


def _receive(pair: keys.KeyPair, peer: str, port: int, answer: Connection) -> None:
    answer.send(asyncio.run(_take(pair, peer, port)))


async def _take(pair: keys.KeyPair, peer: str, port: int) -> tuple[int, float, int]:
    channels = _channels(pair, port)
    received = 0
    async with channels.open(Route("bench", 0, "sender", peer, "token"), False) as channel:
        while data := await channel.read():
            received += len(data)
        await channel.end()
    await channels.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return received, used.ru_utime + used.ru_stime, used.ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
