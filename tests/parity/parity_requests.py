"""The requests that the parity tests send: text, chat, one image, several images, a video file, a video as a list of frames;
pictures are drawn with a seed."""
from pathlib import Path

import av
import numpy as np
from PIL import Image

SEED = 11


def picture(rng, height: int, width: int) -> Image.Image:
    """Smooth blobs with noise: every patch differs, and resizing has something to get wrong."""
    coarse = Image.fromarray((rng.random((height // 12 + 2, width // 12 + 2, 3)) * 255).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def write_clip(path: Path, frames: list, rate: int) -> None:
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            writer.mux(stream.encode(av.VideoFrame.from_image(frame)))
        writer.mux(stream.encode())


def chat(name: str, *parts, system: str | None = None) -> dict:
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return {"name": name, "messages": messages + [{"role": "user", "content": list(parts)}]}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def text_requests() -> list:
    """For the text families: message content is a string."""
    return [
        {"name": "text", "prompt": "The quick brown fox jumps over 12345 lazy dogs"},
        {"name": "chat", "messages": [{"role": "system", "content": "Answer briefly."},
                                      {"role": "user", "content": "Gr\u00fc\u00dfe! What's 7 + 5?"}]},
        {"name": "turns", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
                                       {"role": "user", "content": "\u4f60\u597d\uff0c\u4e16\u754c"}]},
    ]


def vision_requests(directory: Path) -> list:
    """Writes the pictures under `directory`; sizes leave every residue of 32 and both aspect orders to the resizer."""
    rng = np.random.default_rng(SEED)
    for name, height, width in (("tall", 147, 90), ("wide", 64, 233), ("small", 40, 50)):
        picture(rng, height, width).save(directory / f"{name}.png")
    frames = [picture(rng, 72, 100) for _ in range(9)]
    write_clip(directory / "clip.mp4", frames, rate=4)  # sampled down to 4 of 9 frames, at uneven distances
    for n, frame in enumerate(frames[:5]):  # shown as they are; the odd last one is shown twice
        frame.save(directory / f"frame{n}.png")
    image = lambda name: {"type": "image", "image": f"{name}.png"}
    clip = {"type": "video", "video": "clip.mp4"}
    frame_list = {"type": "video", "frames": [f"frame{n}.png" for n in range(5)], "fps": 4.0}
    return [
        {"name": "text", "prompt": "The quick brown fox jumps over 12345 lazy dogs"},
        chat("chat", text("What's 7 + 5?"), system="Answer briefly."),
        chat("image", image("tall"), text("What is in the picture?")),
        chat("images", text("Compare "), image("wide"), text(" with "), image("small"), text(".")),
        chat("video", clip, text("What happens?")),
        chat("mixed", image("small"), frame_list, text("Is the picture a frame?")),
    ]
