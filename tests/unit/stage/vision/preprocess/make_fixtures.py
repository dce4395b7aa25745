"""Writes fixtures/: small files and, in expected.txt, what PIL, torchvision, transformers 5.17.0 and PyAV make of them.

usage: ORACLE_PYTHON make_fixtures.py        (the files are committed; run again only to add one)

A line of expected.txt is "kind name numbers... hash"; hashes are FNV-1a (64 bit) of raw RGB, which the tests recompute.
"""
import hashlib
import io
import os
from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as smart_resize_image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video
from transformers.video_utils import VideoMetadata

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in bytes(data):
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def picture(height, width, channels=3):
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    return (128 + 100 * np.sin(0.31 * x + 0.17 * y * (c + 1)) + ((x * 7 + y * 13 + c * 29) % 23)).astype(np.uint8)


def lcg_pixels(count, seed):
    """The bytes that the C++ tests make for themselves: the high byte of a 32-bit linear congruential generator."""
    out, state = bytearray(), seed
    for _ in range(count):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return np.frombuffer(bytes(out), dtype=np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def images():
    rgb, rgba = Image.fromarray(picture(23, 31)), Image.fromarray(picture(17, 20, 4))
    gray = Image.fromarray(picture(19, 21, 1)[..., 0])
    yield "rgb.png", rgb, dict(format="PNG")
    yield "rgba.png", rgba, dict(format="PNG")
    yield "gray_alpha.png", rgba.convert("LA"), dict(format="PNG")
    yield "one_bit.png", gray.convert("1"), dict(format="PNG")
    yield "palette.png", rgb.quantize(30), dict(format="PNG", transparency=bytes(range(30)))
    yield "gray16.png", Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), dict(format="PNG")
    yield "exif.png", rgb, dict(format="PNG", exif=exif(6))
    yield "baseline_420.jpg", rgb, dict(format="JPEG", quality=85)
    yield "progressive_444.jpg", rgb, dict(format="JPEG", quality=85, subsampling=0, progressive=True)
    yield "gray.jpg", gray, dict(format="JPEG")
    yield "cmyk.jpg", rgb.convert("CMYK"), dict(format="JPEG")
    for orientation in range(1, 9):
        yield f"exif_{orientation}.jpg", rgb, dict(format="JPEG", exif=exif(orientation))
    yield "lossy.webp", rgb, dict(format="WEBP", quality=70)
    yield "lossless_alpha.webp", rgba, dict(format="WEBP", lossless=True, exact=True)
    yield "animated.webp", rgb, dict(format="WEBP", save_all=True, append_images=[rgb.rotate(180)], duration=50)


def videos():
    for name, codec, container, rate, count, size in (
        ("h264.mp4", "libx264", "mp4", Fraction(30000, 1001), 45, (48, 64)),
        ("vp9.webm", "libvpx-vp9", "webm", 10, 17, (32, 48)),
        ("mpeg4_odd_height.avi", "mpeg4", "avi", 8, 10, (45, 50)),
    ):
        out = io.BytesIO()
        with av.open(out, "w", format=container) as writer:
            stream = writer.add_stream(codec, rate=rate)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            still = picture(size[0] * 2, size[1] * 2)
            for i in range(count):
                pixels = np.ascontiguousarray(still[i % size[0] : i % size[0] + size[0], i % size[1] : i % size[1] + size[1]])
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    writer.mux(packet)
            for packet in stream.encode():
                writer.mux(packet)
        yield name, out.getvalue()


def main():
    os.makedirs(FOLDER, exist_ok=True)
    lines = []
    for name, image, options in images():
        path = os.path.join(FOLDER, name)
        image.save(path, **options)
        pixels = np.array(load_image(path))
        lines.append(f"image {name} {pixels.shape[0]} {pixels.shape[1]} {fnv1a(pixels.tobytes())}")
    processor = Qwen3VLVideoProcessor()
    for name, data in videos():
        with open(os.path.join(FOLDER, name), "wb") as f:
            f.write(data)
        container = av.open(io.BytesIO(data))
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        fps = float(container.streams.video[0].average_rate)
        indices = processor.sample_frames(VideoMetadata(total_num_frames=len(frames), fps=fps)).tolist()
        sampled = np.stack([frames[i] for i in indices])
        lines.append(f"video {name} {len(frames)} {fps!r} {','.join(map(str, indices))} {fnv1a(sampled.tobytes())}")
    for i, (height, width, out_height, out_width) in enumerate(
        [(40, 56, 64, 96), (90, 70, 32, 32), (33, 33, 33, 64), (33, 33, 64, 33), (1, 1, 32, 32), (5, 200, 32, 64), (64, 64, 64, 64)]
    ):
        pixels = lcg_pixels(height * width * 3, i + 1).reshape(height, width, 3)
        resized = tvF.resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1), [out_height, out_width],
                             interpolation=tvF.InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).contiguous()
        lines.append(f"resize {i + 1} {height} {width} {out_height} {out_width} {fnv1a(resized.numpy().tobytes())}")
    sizes = [(16, 16), (48, 80), (80, 48), (112, 144), (176, 208), (1080, 1920), (720, 1280), (3000, 4000), (7000, 9000), (1, 200),
             (1, 201), (33, 6600), (10, 1999), (240, 304), (272, 272), (4096, 4096), (4097, 4097), (255, 257)]
    for height, width in sizes:
        for frames in (0, 1, 2, 3, 5, 7, 768):
            low, high = (65536, 16777216) if frames == 0 else (4096, 25165824)
            try:
                size = smart_resize_image(height, width, 32, low, high) if frames == 0 else smart_resize_video(
                    frames, height, width, 2, 32, low, high)
            except ValueError:
                size = (0, 0)
            lines.append(f"smart_resize {frames} {height} {width} {low} {high} {size[0]} {size[1]}")
    for total, fps in ((1, 30.0), (2, 30.0), (3, 30.0), (4, 1.0), (5, 30.0), (61, 25.0), (100, 24.0), (10, 3.9), (90, 30000 / 1001), (100000, 25.0), (27, 2.0)):
        indices = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps)).tolist()
        lines.append(f"sample {total} {fps!r} {','.join(map(str, indices))}")
    for seconds in (0.0, 0.05, 0.15, 0.25, 0.35, 0.45, 1.25, 2.675, 9.95, 99.95, 0.016683333333333335, 12345.65, 1e-9):
        lines.append(f"seconds {seconds!r} {seconds:.1f}")
    grid = np.array([1, 2, 4], dtype="<i4").tobytes()
    lines.append(f"content_hash {hashlib.sha256(grid + lcg_pixels(8 * 1536, 7).tobytes()).hexdigest()}")
    with open(os.path.join(FOLDER, "expected.txt"), "w") as f:
        f.write("\n".join(lines) + "\n")


main()
