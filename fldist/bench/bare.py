"""Bare loops: what the same exchange costs on a backend with nothing around it.

One flat block of float32 goes from rank 0 to each host and back: all sends are posted, then all receives; every
buffer is made once. Nothing is packed, checked, counted or copied, so this is what the runtime is held against.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fldist.bench.party import Orders

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SOCKET_BUFFER = 1 << 18
"""Bytes in the kernel for each direction. Of the default, 256 kB, 1 MB and 4 MB, with a thread a host, one host after
the other, or sends before receives, this with threads was the quickest: what is sent is received from the cache.
"""


def _fork(count: int, work: Callable[[int], None]) -> None:
    """Start `count` children that do work(1), work(2) ... and end; they die with this process, which must have no
    threads yet."""
    from fldist.runtime.launch import die_with_parent

    parent = os.getpid()
    for rank in range(1, count + 1):
        if os.fork() == 0:
            code = 1
            try:
                die_with_parent(parent)
                work(rank)
                code = 0
            finally:
                os._exit(code)


def _check(same: Any) -> None:
    if not same:
        raise RuntimeError("what came back is not what was sent")


def gloo(path: str, numel: int, hosts: int, rounds: int, store: str) -> None:
    """torch.distributed over loopback; store: a file that does not exist yet, for the rendezvous."""
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    _fork(hosts, lambda rank: _gloo_host(rank, numel, hosts, rounds, store))
    dist = _gloo_group(0, hosts, store)
    block = torch.rand(numel)
    back = [torch.zeros(numel) for _ in range(hosts)]
    orders = Orders(path)
    orders.ready()
    for number in range(rounds):
        if not orders.wait():
            break
        began = time.perf_counter()
        works = [dist.isend(block, rank) for rank in range(1, hosts + 1)]
        works += [dist.irecv(buffer, rank) for rank, buffer in enumerate(back, start=1)]
        for work in works:
            work.wait()
        round_s = time.perf_counter() - began
        if number == 0:
            for buffer in back:
                _check((buffer == block).all())
        orders.answer(round_s=round_s)


def _gloo_group(rank: int, hosts: int, store: str) -> Any:
    import torch.distributed as dist

    file = dist.FileStore(store, hosts + 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=hosts + 1, timeout=timedelta(minutes=30))
    return dist


def _gloo_host(rank: int, numel: int, hosts: int, rounds: int, store: str) -> None:
    import torch

    dist = _gloo_group(rank, hosts, store)
    block = torch.zeros(numel)
    for _ in range(rounds):
        dist.recv(block, 0)
        dist.send(block, 0)


def mpi(path: str, numel: int, rounds: int) -> None:
    """mpi4py under mpirun: every rank takes orders, so that in between none waits in MPI, where waiting is polling."""
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    orders = Orders(path, rank)
    block = np.random.default_rng(0).random(numel, dtype=np.float32) if rank == 0 else np.zeros(numel, np.float32)
    back = [np.zeros(numel, np.float32) for _ in range(1, size)] if rank == 0 else []
    orders.ready()
    for number in range(rounds):
        if not orders.wait():
            break
        comm.Barrier()
        began = time.perf_counter()
        if rank == 0:
            requests = [comm.Isend([block, MPI.FLOAT], peer) for peer in range(1, size)]
            requests += [comm.Irecv([buffer, MPI.FLOAT], peer) for peer, buffer in enumerate(back, start=1)]
            MPI.Request.Waitall(requests)
        else:
            comm.Irecv([block, MPI.FLOAT], 0).Wait()
            comm.Isend([block, MPI.FLOAT], 0).Wait()
        round_s = time.perf_counter() - began
        if number == 0:
            for buffer in back:
                _check((buffer == block).all())
        orders.answer(round_s=round_s)


def tcp(path: str, numel: int, hosts: int, rounds: int) -> None:
    """Plain sockets over loopback, a thread a host at rank 0: what the kernel can do."""
    nbytes = 4 * numel
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    _fork(hosts, lambda rank: _tcp_host(address, nbytes, rounds))
    peers = [_tuned(listener.accept()[0]) for _ in range(hosts)]
    listener.close()
    block = os.urandom(nbytes)
    back = [bytearray(nbytes) for _ in range(hosts)]

    def exchange(peer: socket.socket, buffer: bytearray) -> None:
        peer.sendall(block)
        _fill(peer, buffer)

    orders = Orders(path)
    orders.ready()
    for number in range(rounds):
        if not orders.wait():
            break
        began = time.perf_counter()
        threads = [threading.Thread(target=exchange, args=pair) for pair in zip(peers, back, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        round_s = time.perf_counter() - began
        if number == 0:
            for buffer in back:
                _check(buffer == block)
        orders.answer(round_s=round_s)


def _tcp_host(address: tuple[str, int], nbytes: int, rounds: int) -> None:
    peer = _tuned(socket.create_connection(address))
    buffer = bytearray(nbytes)
    for _ in range(rounds):
        _fill(peer, buffer)
        peer.sendall(buffer)


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    return sock


def _fill(sock: socket.socket, buffer: bytearray) -> None:
    """Receive until the buffer is full."""
    left = memoryview(buffer)
    while left.nbytes:
        count = sock.recv_into(left)
        if not count:
            raise ConnectionError("the other end has closed")
        left = left[count:]
