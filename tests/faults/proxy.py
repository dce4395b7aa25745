"""A proxy that misbehaves, between the operator and the API server. It ends TLS on both sides, so that it can answer itself: each
request is drawn from a seeded die and is passed on, refused, cut or answered into the void. It counts what gets through.
"""
import asyncio
import json
import random
import ssl
import threading
from dataclasses import dataclass, field

REFUSALS = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}
WRITES = {"POST", "PUT", "PATCH", "DELETE"}


@dataclass
class Faults:
    """What happens to `share` of the requests. codes: refusals, 409 of writes and 410 of reads only. cut: the connection ends before the
    request is passed on. lost: it is carried out, and the answer is not given. torn: half an answer. leases: those of elections too.
    methods: only of these; empty: of all."""
    share: float = 0.0
    codes: tuple = ()
    cut: bool = False
    lost: bool = False
    torn: bool = False
    leases: bool = False
    methods: tuple = ()

    def kinds(self, method):
        if self.methods and method not in self.methods:
            return []
        kinds = [c for c in self.codes if (c != 409 or method in WRITES) and (c != 410 or method == "GET")]
        return kinds + [name for name in ("cut", "lost", "torn") if getattr(self, name)]


@dataclass(eq=False)  # one of a set by identity
class Watch:
    writer: asyncio.StreamWriter
    frozen: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    def __init__(self, cluster, seed):
        self.random, self.faults = random.Random(seed), Faults()
        self.host, port = cluster.server.removeprefix("https://").rsplit(":", 1)
        self.upstream_port = int(port)
        self.to_server = ssl.create_default_context(cafile=cluster.pki / "ca.crt")
        self.to_server.load_cert_chain(cluster.pki / "admin.crt", cluster.pki / "admin.key")
        self.to_client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.to_client.load_cert_chain(cluster.pki / "apiserver.crt", cluster.pki / "apiserver.key")  # for 127.0.0.1 as well
        self.watches, self.done, self.writes = set(), {}, []
        self.loop = asyncio.new_event_loop()
        started = threading.Event()

        def run():
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.to_client))
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()
        threading.Thread(target=run, daemon=True).start()
        started.wait(10)
        config = (cluster.dir / "admin.kubeconfig").read_text().replace(cluster.server, f"https://127.0.0.1:{self.port}")
        self.kubeconfig = cluster.dir / f"proxied-{self.port}.kubeconfig"
        self.kubeconfig.write_text(config)

    def on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    # -- faults of watches that are under way

    def freeze_watches(self):
        """Half-open: they stay open and say nothing any more. New ones work."""
        async def freeze():
            for watch in self.watches:
                watch.frozen = True
            return len(self.watches)
        return self.on_loop(freeze())

    def expire_watches(self):
        """An ERROR event in the stream, as when what was seen last is compacted away."""
        async def expire():
            event = json.dumps({"type": "ERROR", "object": self.status(410)}).encode() + b"\n"
            for watch in [w for w in self.watches if not w.frozen]:
                watch.writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event))
                watch.over.set()
        self.on_loop(expire())

    def tear_watches(self):
        """They end in the middle of a line."""
        async def tear():
            for watch in [w for w in self.watches if not w.frozen]:
                watch.writer.write(b'1a\r\n{"type":"MODIFIED","object\r\n')
                watch.over.set()
        self.on_loop(tear())

    # -- a connection

    @staticmethod
    def status(code):
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": REFUSALS[code], "message": "the proxy is in a bad mood"}

    async def serve(self, reader, writer):
        upstream = None
        try:
            while head := await self.head(reader):
                method, path = head.split(b"\r\n", 1)[0].decode().split(" ")[:2]
                body = await self.body(reader, self.headers(head))
                watching = "watch=true" in path or "watch=1" in path
                fault = self.draw(method, path)
                self.done[fault] = self.done.get(fault, 0) + 1
                if fault == "cut":
                    return
                if isinstance(fault, int):
                    text = json.dumps(self.status(fault)).encode()
                    retry = b"Retry-After: 1\r\n" if fault == 429 else b""
                    writer.write(b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s" %
                                 (fault, REFUSALS[fault].encode(), retry, len(text), text))
                    await writer.drain()
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection(self.host, self.upstream_port, ssl=self.to_server, limit=1 << 24)
                upstream[1].write(head + body)
                await upstream[1].drain()
                if method in WRITES and "/leases" not in path and "/events" not in path:
                    self.writes.append(f"{method} {path}")
                if not await self.answer(upstream[0], writer, fault, watching):
                    return
        except (OSError, asyncio.IncompleteReadError, ValueError, ssl.SSLError):
            pass  # one of the two hung up
        finally:
            for side in [writer] + ([upstream[1]] if upstream else []):
                side.transport.abort()

    def draw(self, method, path):
        faults = self.faults
        if ("/leases" in path and not faults.leases) or self.random.random() >= faults.share:
            return None
        kinds = faults.kinds(method)
        return self.random.choice(kinds) if kinds else None

    async def answer(self, reader, writer, fault, watching):
        """False: the connection is over."""
        head = await self.head(reader)
        headers = self.headers(head)
        if fault == "lost":
            await self.body(reader, headers, watching)
            return False
        if watching and head.startswith(b"HTTP/1.1 200"):
            writer.write(head)
            return await self.relay_watch(reader, writer)
        body = await self.body(reader, headers)
        if fault == "torn":
            writer.write((head + body)[:len(head) + len(body) // 2])
            await writer.drain()
            return False
        writer.write(head + body)
        await writer.drain()
        return True

    async def relay_watch(self, reader, writer):
        watch = Watch(writer)
        self.watches.add(watch)
        over = asyncio.ensure_future(watch.over.wait())
        try:
            while True:
                chunk = asyncio.ensure_future(self.chunk(reader))
                await asyncio.wait({chunk, over}, return_when=asyncio.FIRST_COMPLETED)
                if over.done():
                    chunk.cancel()
                    await writer.drain()
                    return False
                data = await chunk
                if watch.frozen:
                    continue
                writer.write(data)
                await writer.drain()
                if data == b"0\r\n\r\n":
                    return True
        finally:
            over.cancel()
            self.watches.discard(watch)

    # -- HTTP/1.1

    @staticmethod
    async def head(reader):
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as e:
            if e.partial:
                raise
            return b""

    @staticmethod
    def headers(head):
        return {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head.decode("latin1").split("\r\n")[1:])}

    @staticmethod
    async def chunk(reader):
        size = await reader.readuntil(b"\r\n")
        return size + await reader.readexactly(int(size, 16) + 2)

    async def body(self, reader, headers, once=False):
        if headers.get("transfer-encoding") == "chunked":
            parts = [await self.chunk(reader)]
            while parts[-1] != b"0\r\n\r\n" and not once:
                parts.append(await self.chunk(reader))
            return b"".join(parts)
        return await reader.readexactly(int(headers.get("content-length", 0)))
