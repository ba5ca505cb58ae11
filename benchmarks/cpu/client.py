"""A client that imports nothing heavy: `benchmarks.cpu.serving` starts it, with a port and a number of connections."""

import asyncio
import json
import sys
import time


async def client(port: int, connections: int) -> None:
    """Send what stdin holds over so many connections; print when each token came."""
    open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    print("ready", flush=True)
    body = sys.stdin.read().encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    seen: list[float] = []

    async def one(reader, writer):
        writer.write(head.encode() + body)
        while line := await reader.readline():
            if line.startswith(b'data: {"id"'):
                seen.append(time.monotonic())

    await asyncio.gather(*(one(*pair) for pair in open_ones))
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(client(*map(int, sys.argv[1:])))
