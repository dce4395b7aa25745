"""The demo's questions and their right answers, and streamed answers that are read as they come: for tests that break things meanwhile."""
import base64
import json
import threading
import urllib.request
from pathlib import Path

DIGITS = Path(__file__).resolve().parents[1] / "docs/examples/digits"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def pictures():
    """[(file, what transformers answers)]: handwritten digits that the model was never trained on."""
    known = json.loads((DIGITS / "held_out.json").read_text())
    answers = dict(zip(known["index"], known["answer"]))
    return [(file, answers[int(file.name[:4])]) for file in sorted(DIGITS.glob("[0-9]*.png"))]


def question(file, **more):
    """The body of a chat completion about the picture."""
    picture = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    return {"model": "digits", "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Which digit is this?"}]}], **more}


class Stream:
    """One streamed answer of `tokens` tokens. `inside` runs what it is given where `url` can be reached."""

    def __init__(self, url, file, tokens, inside=lambda read: read()):
        self.pieces, self.error, self.done = [], None, False
        body = question(file, max_tokens=tokens, ignore_eos=True, stream=True)
        self.thread = threading.Thread(target=self.run, args=(url, body, inside), daemon=True)
        self.thread.start()

    def run(self, url, body, inside):
        try:
            inside(lambda: self.read(url, body))
        except Exception as e:  # told by the check that wants the text
            self.error = repr(e)

    def read(self, url, body):
        request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with DIRECT.open(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: [DONE]"):
                    self.done = True
                elif line.startswith(b"data: "):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    self.pieces.append(choices[0].get("delta", {}).get("content") or "")

    def text(self):
        self.thread.join(150)
        return "".join(self.pieces) if self.done and not self.error else f"broken off after {len(self.pieces)} pieces: {self.error}"
