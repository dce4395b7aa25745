"""A pipeline as `qwenctl run` starts it, and requests to it: what the end-to-end tests share. Standard library only."""
import base64
import json
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

READY_SECONDS = 120  # a tiny checkpoint is ready in about one; the machine may be busy


def manifest(checkpoint: Path, *, stages, dtype: str = "Auto", engine: dict | None = None,
             model: dict | None = None) -> dict:
    """`stages`: a count, or layer ranges [(begin, end), ...]. `engine`, `model`: further fields of those."""
    layout = {"count": stages} if isinstance(stages, int) else {
        "list": [{"name": f"s{n}", "layers": {"begin": a, "end": b}} for n, (a, b) in enumerate(stages)]}
    return {"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": "parity"},
            "spec": {"model": {"id": "parity", "source": {"path": str(checkpoint)}, "dtype": dtype} | (model or {}),
                     "stages": layout,
                     "engine": {"device": "Cpu", "threads": 1, "kvCacheTokens": 16384} | (engine or {})}}


class Pipeline:
    """with Pipeline(qwenctl, manifest) as p: p.post("/v1/completions", {...}); `spec`: a manifest, or the path of one"""

    def __init__(self, qwenctl: str, spec: dict | Path, flags: list[str] = ()):
        self.folder = tempfile.TemporaryDirectory()
        path = spec
        if isinstance(spec, dict):
            path = Path(self.folder.name) / "pipeline.yaml"
            path.write_text(json.dumps(spec))  # JSON is YAML
        self.log = open(Path(self.folder.name) / "log", "w+")
        self.process = subprocess.Popen([qwenctl, "run", "-f", str(path), "--port", "0", *flags], stdout=subprocess.PIPE,
                                        stderr=self.log, text=True)
        self.url = None

    def __enter__(self):
        timer = threading.Timer(READY_SECONDS, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:  # "ready URL" when it serves; ends when the process does
                if line.startswith("ready "):
                    self.url = line.split()[1].rstrip("/")
                    return self
        finally:
            timer.cancel()
        self.process.wait()
        raise RuntimeError(f"qwenctl run ended with {self.process.returncode}:\n{self.tail()}")

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)  # drain; qwenctl ends its children
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        if exception[0]:
            print(self.tail())
        self.log.close()
        self.folder.cleanup()

    def tail(self, lines: int = 30) -> str:
        self.log.flush()
        self.log.seek(0)
        return "".join(self.log.readlines()[-lines:])

    def post(self, path: str, body: dict, timeout: float = 300) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{path}: {e.code} {e.read().decode()[:500]}") from e

    def metrics(self) -> dict[str, float]:
        """The head's samples, without the label that names the model."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as response:
            lines = [line.decode().split() for line in response if not line.startswith(b"#")]
        tidy = lambda name: name.replace('model_name="parity"', "").replace("{,", "{").replace(",}", "}").replace("{}", "")  # noqa: E731
        return {tidy(name): float(value) for name, value in lines}


def data_url(path: Path, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def openai_messages(messages: list, base: Path) -> list:
    """The oracle's request form -> the wire's: pictures and frames inline."""
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    parts.append({"type": "image_url", "image_url": {"url": data_url(base / part["image"])}})
                elif part["type"] == "video" and "video" in part:
                    parts.append({"type": "video_url", "video_url": {"url": data_url(base / part["video"], "video/mp4")}})
                elif part["type"] == "video":
                    parts.append({"type": "video", "video": [data_url(base / f) for f in part["frames"]], "fps": part["fps"]})
                else:
                    parts.append(part)
            content = parts
        out.append({"role": message["role"], "content": content})
    return out
