"""A client that does as little as can be; `benchmarks.cpu.serving` starts it with a port and how many connections."""

import json
import select
import socket
import sys
import time


def client(port: int, connections: int) -> None:
    """Send what stdin holds over so many connections; print when each token came to its socket."""
    open_ones = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    print("ready", flush=True)
    body = sys.stdin.read().encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    poll, by = select.epoll(), {each.fileno(): each for each in open_ones}
    for number, each in by.items():
        each.sendall(head.encode() + body)
        poll.register(number, select.EPOLLIN)
    seen: list[float] = []
    while by:
        for number, _ in poll.poll():
            got, now = by[number].recv(1 << 16), time.monotonic()
            seen += [now] * got.count(b'data: {"id"')
            if not got:
                poll.unregister(number)
                del by[number]
    print(json.dumps(seen))


if __name__ == "__main__":
    client(*map(int, sys.argv[1:]))
