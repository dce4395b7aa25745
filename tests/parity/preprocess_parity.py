"""Preprocessing in C++ against transformers 5.17.0's own classes, PIL, torchvision and PyAV: bits, not tolerances.

usage: preprocess_parity.py --qp_preprocess_dump PATH [--seed N]

Every picture, size and video is made here from a printed seed. The references are called, never re-implemented:
load_image, Qwen2VLImageProcessor, Qwen3VLVideoProcessor, Qwen3VLProcessor, Qwen3VLModel.get_rope_index, load_video.
"""
import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import av
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as smart_resize_image
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video
from transformers.video_utils import VideoMetadata, load_video
from torchvision.transforms.v2 import functional as tvF

IMAGE_PAD, VIDEO_PAD = 151655, 151656

# What the released checkpoints hold (preprocessor_config.json, video_preprocessor_config.json).
IMAGE_JSON = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
              "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
              "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
VIDEO_JSON = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2,
              "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
              "processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}


class Dump:
    """The C++ side, as functions."""

    def __init__(self, program, folder):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder

    def __call__(self, op, **fields):
        self.process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the C++ side died at {op}"
        return json.loads(line)

    def path(self, name):
        return os.path.join(self.folder, name)

    def file(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)
        return self.path(name)

    def bytes(self, name):
        return np.fromfile(self.path(name), dtype=np.uint8)


class Report:
    def __init__(self):
        self.checks, self.failures = 0, []

    def equal(self, name, ours, theirs):
        """Bits, except for the one case that docs/numerics.md declares: decoded frames with both sides odd, a level in at most
        1 % of the samples. Their patches are compared with what the reference makes of our frames: bits again."""
        self.checks += 1
        if name.endswith("odd 4:2:0 size: frames") and np.shape(ours) == np.shape(theirs) and np.ndim(ours) > 1:
            difference = np.abs(np.asarray(ours, dtype=np.int64) - np.asarray(theirs, dtype=np.int64))
            if difference.max() <= 1 and (difference > 0).mean() < 0.01:
                return
        if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
            ours, theirs = np.asarray(ours), np.asarray(theirs)
            if ours.shape == theirs.shape and (ours == theirs).all():
                return
            why = f"shapes {ours.shape} {theirs.shape}"
            if ours.shape == theirs.shape:
                difference = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
                why = f"{(difference > 0).sum()} of {difference.size} differ, by at most {difference.max()}"
        else:
            if ours == theirs:
                return
            why = f"ours {str(ours)[:200]} theirs {str(theirs)[:200]}"
        self.failures.append(f"{name}: {why}")
        print("DIFFERENT", self.failures[-1], flush=True)


def picture(rng, height, width, channels=3):
    """Smooth shapes with noise on top, so that filters and codecs have edges, ramps and texture to get wrong."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.empty((height, width, channels))
    for c in range(channels):
        fx, fy, phase = rng.uniform(0.01, 0.6, 2).tolist() + [rng.uniform(0, 6)]
        out[..., c] = 127 + 110 * np.sin(fx * x + fy * y + phase) + rng.normal(0, 15, (height, width))
    x0, y0 = rng.integers(0, width), rng.integers(0, height)
    out[y0 : y0 + height // 3, x0 : x0 + width // 3] = rng.integers(0, 256, channels)
    return np.clip(out, 0, 255).astype(np.uint8)


def saved(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def exif_bytes(orientation):
    exif = Image.Exif()
    exif[0x010E] = "a description before the tag"
    exif[0x0112] = orientation
    return exif.tobytes()


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def raw_png(width, height, depth, color, rows, extra=b""):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, 0])
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b""))


def encoded_images(rng):
    """(name, bytes of an image file)"""
    rgb = Image.fromarray(picture(rng, 61, 83))
    gray = Image.fromarray(picture(rng, 40, 57, 1)[..., 0])
    rgba = Image.fromarray(picture(rng, 50, 33, 4))
    yield "png rgb", saved(rgb, "PNG")
    yield "png rgba", saved(rgba, "PNG")
    yield "png gray", saved(gray, "PNG")
    yield "png gray+alpha", saved(rgba.convert("LA"), "PNG")
    yield "png 1 bit", saved(gray.convert("1"), "PNG")
    yield "png palette", saved(rgb.quantize(200), "PNG")
    yield "png palette 4 bit", saved(rgb.quantize(13), "PNG", bits=4)
    yield "png palette 2 bit", saved(rgb.quantize(4), "PNG", bits=2)
    yield "png palette 1 bit", saved(rgb.quantize(2), "PNG", bits=1)
    yield "png palette + tRNS", saved(rgb.quantize(50), "PNG", transparency=bytes(range(0, 250, 5)))
    yield "png rgb + tRNS", saved(rgb, "PNG", transparency=(1, 2, 3))
    yield "png gray + tRNS", saved(gray, "PNG", transparency=77)
    yield "png 16-bit gray", saved(Image.fromarray(rng.integers(0, 1000, (20, 31)).astype(np.uint16)), "PNG")
    for depth in (1, 2, 4):
        width = 19
        rows = [rng.integers(0, 256, (width * depth + 7) // 8, dtype=np.uint8).tobytes() for _ in range(9)]
        yield f"png gray {depth} bit", raw_png(width, 9, depth, 0, rows)
    for color, channels in ((2, 3), (4, 2), (6, 4)):
        rows = [rng.integers(0, 256, 2 * channels * 11, dtype=np.uint8).tobytes() for _ in range(7)]
        yield f"png 16-bit color type {color}", raw_png(11, 7, 16, color, rows)
    palette = png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    yield "png index beyond the palette", raw_png(4, 1, 8, 3, [bytes([0, 1, 2, 200])], palette)
    yield "png gamma and chromaticities ignored", raw_png(
        5, 3, 8, 2, [rng.integers(0, 256, 15, dtype=np.uint8).tobytes() for _ in range(3)],
        png_chunk(b"gAMA", (30000).to_bytes(4, "big")) + png_chunk(b"sRGB", b"\0"))
    for orientation in (1, 3, 6, 8):
        yield f"png eXIf {orientation}", saved(rgb, "PNG", exif=exif_bytes(orientation))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="5"/>')
    yield "png xmp orientation", saved(rgb, "PNG", pnginfo=text)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      50\n" + exif_bytes(7).hex() + "\n", zip=True)
    yield "png raw profile orientation", saved(rgb, "PNG", pnginfo=text)
    yield "png apng", saved(rgb, "PNG", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])

    for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
        for quality in (30, 92):
            for progressive in (False, True):
                name = f"jpeg {subsampling} q{quality} {'progressive' if progressive else 'baseline'}"
                size = rng.integers(1, 120, 2)
                yield name, saved(Image.fromarray(picture(rng, *size)), "JPEG", quality=quality, subsampling=subsampling,
                                  progressive=progressive)
    yield "jpeg gray", saved(gray, "JPEG")
    yield "jpeg cmyk", saved(rgb.convert("CMYK"), "JPEG", quality=90)
    yield "jpeg cmyk progressive", saved(Image.fromarray(picture(rng, 40, 40, 4), "CMYK"), "JPEG", progressive=True)
    yield "jpeg keep rgb", saved(rgb, "JPEG", keep_rgb=True)
    yield "jpeg restart markers", saved(rgb, "JPEG", restart_marker_blocks=2)
    yield "jpeg optimised", saved(rgb, "JPEG", optimize=True)
    for orientation in range(0, 10):
        yield f"jpeg exif {orientation}", saved(rgb, "JPEG", exif=exif_bytes(orientation))
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    yield "jpeg exif big-endian", saved(rgb, "JPEG", exif=big_endian)
    yield "jpeg xmp orientation", saved(rgb, "JPEG", xmp=b"<tiff:Orientation>8</tiff:Orientation>")
    yield "jpeg exif wins over xmp", saved(rgb, "JPEG", exif=exif_bytes(3), xmp=b'tiff:Orientation="6"')
    yield "jpeg mpo", saved(rgb, "MPO", save_all=True, append_images=[rgba.convert("RGB")])

    for quality in (20, 80, 100):
        yield f"webp lossy q{quality}", saved(Image.fromarray(picture(rng, *rng.integers(1, 100, 2))), "WEBP", quality=quality)
    yield "webp lossless", saved(rgb, "WEBP", lossless=True)
    yield "webp lossless alpha", saved(rgba, "WEBP", lossless=True, exact=True)
    yield "webp lossy alpha", saved(rgba, "WEBP", quality=70)
    yield "webp exif 6", saved(rgb, "WEBP", exif=exif_bytes(6))
    yield "webp xmp 4", saved(rgb, "WEBP", xmp=b'tiff:Orientation="4"')
    yield "webp animated", saved(rgba, "WEBP", save_all=True, append_images=[rgba.transpose(Image.Transpose.ROTATE_180)],
                                 duration=100)


def check_decode(cpp, report, rng):
    for name, data in encoded_images(rng):
        file = cpp.file("image", data)
        theirs = np.array(load_image(Image.open(io.BytesIO(data))))
        answer = cpp("decode", file=file, out=cpp.path("rgb"))
        if "error" in answer:
            report.equal(name, answer, "decodes")
            continue
        report.equal(name, cpp.bytes("rgb").reshape(answer["height"], answer["width"], 3), theirs)


def check_resize(cpp, report, rng):
    shapes = [(rng.integers(1, 200), rng.integers(1, 200), rng.integers(1, 260), rng.integers(1, 260)) for _ in range(300)]
    shapes += [(64, 96, 64, 96), (64, 96, 64, 31), (64, 96, 31, 96), (1, 1, 32, 32), (2, 2, 64, 64), (500, 3, 32, 320),
               (37, 41, 37 * 2, 41 * 2), (128, 128, 64, 64), (128, 128, 32, 32), (96, 96, 64, 64), (1080, 1920, 1088, 1920),
               (720, 1280, 736, 1280), (900, 1600, 64, 96)]
    for height, width, out_height, out_width in shapes:
        pixels = picture(rng, height, width)
        if rng.random() < 0.3:  # hard black and white: the filter overshoots and clamps
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        cpp("resize", file=cpp.file("raw", pixels.tobytes()), height=int(height), width=int(width),
            targets=[[int(out_height), int(out_width), cpp.path("resized")]])
        theirs = tvF.resize(torch.from_numpy(pixels).permute(2, 0, 1), [int(out_height), int(out_width)],
                            interpolation=tvF.InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()
        report.equal(f"resize {height}x{width} -> {out_height}x{out_width}",
                     cpp.bytes("resized").reshape(out_height, out_width, 3), theirs)


def check_weights(cpp, report, rng):
    """One row of pixels: every pair of lengths is another set of filter weights."""
    for length in list(range(1, 70)) + [97, 128, 200, 255, 333, 640, 1000, 1920]:
        pixels = rng.integers(0, 2, (1, length, 3), dtype=np.uint8) * 255
        lengths = sorted(set(rng.integers(1, 400, 25).tolist() + [32, 64, 96, 128, length, 2 * length]))
        cpp("resize", file=cpp.file("raw", pixels.tobytes()), height=1, width=length,
            targets=[[1, n, cpp.path(f"row{i}")] for i, n in enumerate(lengths)])
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        for i, n in enumerate(lengths):
            theirs = tvF.resize(tensor, [1, n], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
            report.equal(f"resize row {length} -> {n}", cpp.bytes(f"row{i}").reshape(1, n, 3), theirs.permute(1, 2, 0).numpy())


def check_smart_resize(cpp, report, rng):
    cases = []
    for _ in range(4000):
        height, width = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        frames = int(rng.choice([0, 0, 1, 2, 3, 5, 7, 10, 100, 767, 768]))
        low = int(2 ** rng.uniform(8, 17))
        cases.append([frames, height, width, 32, low, low * int(2 ** rng.uniform(1, 10))])
    for side in range(1, 400):  # halves of 32: where rounding to even shows
        cases += [[0, side * 16, 48, 32, 1024, 1 << 40], [4, side * 16, 80, 32, 1024, 1 << 40]]
    answer = cpp("smart_resize", cases=cases)["sizes"]
    for case, ours in zip(cases, answer):
        frames, height, width, factor, low, high = case
        try:
            if frames == 0:
                theirs = list(smart_resize_image(height, width, factor, low, high))
            else:
                theirs = list(smart_resize_video(frames, height, width, 2, factor, low, high))
        except ValueError:
            theirs = "error"
        report.equal(f"smart_resize {case}", ours, theirs)


def check_sampling(cpp, report, rng, video_processor):
    cases = [[int(2 ** rng.uniform(0, 15)), float(rng.choice([1, 5, 12.5, 23.976023976, 24, 25, 30000 / 1001, 30, 50, 60, 120]))]
             for _ in range(1500)]
    for case, ours in zip(cases, cpp("sample", cases=cases)["indices"]):
        metadata = VideoMetadata(total_num_frames=case[0], fps=case[1])
        report.equal(f"sample_frames {case}", ours, video_processor.sample_frames(metadata).tolist())


class Tokenizer:
    """As much of a tokenizer as Qwen3VLProcessor needs: characters, and the special tokens as one id each."""

    SPECIAL = {"<|image_pad|>": IMAGE_PAD, "<|video_pad|>": VIDEO_PAD, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
    init_kwargs = {}
    model_input_names = ["input_ids"]

    def convert_tokens_to_ids(self, token):
        return self.SPECIAL[token]

    def encode(self, text):
        ids = []
        while text:
            special = next((s for s in self.SPECIAL if text.startswith(s)), None)
            ids.append(self.SPECIAL[special] if special else ord(text[0]))
            text = text[len(special) if special else 1 :]
        return ids

    def __call__(self, texts, **kwargs):
        return {"input_ids": [self.encode(t) for t in texts]}


def make_processor(image_processor, video_processor):
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)  # its __init__ wants a real tokenizer class
    processor.image_processor, processor.video_processor, processor.tokenizer = image_processor, video_processor, Tokenizer()
    for name in ("image", "video"):
        setattr(processor, f"{name}_token", f"<|{name}_pad|>")
        setattr(processor, f"{name}_token_id", Tokenizer.SPECIAL[f"<|{name}_pad|>"])
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    return processor


def uint8_patches(pixel_values):
    """Undoes (x - 127.5) / 127.5, which is exact for these 256 values after rounding."""
    return torch.round(pixel_values * 127.5 + 127.5).to(torch.uint8).numpy()


def rope_index(ids, image_grids, video_grids):
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)))
    model.get_vision_position_ids = types.MethodType(Qwen3VLModel.get_vision_position_ids, model)
    ids = torch.tensor([ids])
    kinds = (ids == IMAGE_PAD).int() + 2 * (ids == VIDEO_PAD).int()
    positions, delta = Qwen3VLModel.get_rope_index(
        model, ids, kinds, torch.tensor(image_grids) if image_grids else None,
        torch.tensor(video_grids) if video_grids else None)
    return positions[:, 0].tolist(), int(delta[0, 0])


def runs_of(ids, token):
    runs = []
    for i, t in enumerate(ids):
        if t == token:
            if i and ids[i - 1] == token:
                runs[-1][1] += 1
            else:
                runs.append([i, 1])
    return runs


def check_prompt(cpp, report, name, text, expanded, image_grids, videos):
    """`videos`: (grid, timestamps) as C++ gave them. `expanded`: the reference's text."""
    answer = cpp("expand", text=text, images=image_grids, videos=[{"grid": g, "timestamps": t} for g, t in videos])
    report.equal(f"{name}: prompt", answer.get("text", answer), expanded)
    ids = Tokenizer().encode(expanded)
    video_grids = [g for g, _ in videos]
    answer = cpp("positions", tokens=ids, images=image_grids, videos=video_grids, image_pad=IMAGE_PAD, video_pad=VIDEO_PAD)
    positions, delta = rope_index(ids, image_grids, video_grids)
    report.equal(f"{name}: positions", answer.get("positions", answer), positions)
    report.equal(f"{name}: delta", answer.get("delta"), delta)
    report.equal(f"{name}: image runs", sum(answer["image_runs"], []), runs_of(ids, IMAGE_PAD))
    report.equal(f"{name}: video runs", sum(answer["video_runs"], []), runs_of(ids, VIDEO_PAD))


def check_images(cpp, report, rng, processor):
    sizes = [(160, 224), (32, 32), (1, 7), (300, 1), (31, 900), (1080, 1920), (257, 255), (48, 80)]
    sizes += [tuple(int(v) for v in rng.integers(20, 700, 2)) for _ in range(12)]
    grids, pictures = [], []
    for height, width in sizes:
        image = Image.fromarray(picture(rng, height, width))
        data = saved(image, "PNG") if rng.random() < 0.5 else saved(image, "JPEG", quality=90)
        image = load_image(Image.open(io.BytesIO(data)))
        theirs = None
        try:
            theirs = processor.image_processor(images=[image], return_tensors="pt")
        except ValueError:
            pass
        answer = cpp("image", file=cpp.file("image", data), out=cpp.path("patches"), checkpoint=cpp.folder)
        if theirs is None:
            report.equal(f"image {height}x{width} is refused", "error" in answer, True)
            continue
        report.equal(f"image {height}x{width}: grid", [answer.get("grid", answer)], theirs["image_grid_thw"].tolist())
        patches = uint8_patches(theirs["pixel_values"])
        report.equal(f"image {height}x{width}: patches", cpp.bytes("patches").reshape(-1, 1536), patches)
        normalised = (torch.from_numpy(patches).float() - 127.5) / 127.5
        report.equal(f"image {height}x{width}: normalisation", torch.equal(normalised, theirs["pixel_values"]), True)
        if len(grids) < 3:
            grids.append(answer["grid"])
            pictures.append(image)
    text = "one <|vision_start|><|image_pad|><|vision_end|> two <|vision_start|><|image_pad|><|vision_end|>" \
           "<|vision_start|><|image_pad|><|vision_end|> and the end"
    _, replacements = processor._process_images(pictures, return_tensors="pt")
    expanded = processor.get_text_with_replacements([text], replacements, [], [])[0][0]
    check_prompt(cpp, report, "three images", text, expanded, grids, [])


def encode_video(codec, container, frames, rate, pix_fmt="yuv420p", options=None, color=None):
    out = io.BytesIO()
    with av.open(out, "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        if color:
            stream.codec_context.colorspace, stream.codec_context.color_range = color
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if color:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=color[0], dst_color_range=color[1])
            for packet in stream.encode(frame):
                writer.mux(packet)
        for packet in stream.encode():
            writer.mux(packet)
    return out.getvalue()


def moving_picture(rng, count, height, width):
    still = picture(rng, height * 2, width * 2)
    return [np.ascontiguousarray(still[i % height : i % height + height, (2 * i) % width : (2 * i) % width + width])
            for i in range(count)]


def reference_frames(data, sample):
    """transformers' read_video_pyav; where the header has no frame count (webm), the same with the frames counted."""
    container = av.open(io.BytesIO(data))
    stream = container.streams.video[0]
    total = stream.frames or sum(1 for _ in av.open(io.BytesIO(data)).decode(video=0))
    metadata = VideoMetadata(total_num_frames=total, fps=float(stream.average_rate))
    metadata.frames_indices = sample(metadata)
    wanted = set(metadata.frames_indices.tolist())
    frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted]
    return np.stack(frames), metadata


def videos(rng):
    """(name, bytes of a video file)"""
    from fractions import Fraction
    yield "h264 mp4 25 fps", encode_video("libx264", "mp4", moving_picture(rng, 61, 144, 176), 25)
    yield "h264 mp4 29.97 fps, b frames", encode_video(
        "libx264", "mp4", moving_picture(rng, 90, 120, 160), Fraction(30000, 1001), options={"bf": "3", "preset": "fast"})
    yield "h264 mkv 10 fps, odd count", encode_video("libx264", "matroska", moving_picture(rng, 35, 96, 128), 10)
    yield "h264 mp4 short", encode_video("libx264", "mp4", moving_picture(rng, 3, 64, 64), 30)
    yield "h264 mp4 odd size", encode_video("libx264", "mp4", moving_picture(rng, 9, 101, 75), 5, pix_fmt="yuv444p")
    yield "h264 mp4 422", encode_video("libx264", "mp4", moving_picture(rng, 9, 98, 130), 5, pix_fmt="yuv422p")
    yield "h264 mp4 full range", encode_video("libx264", "mp4", moving_picture(rng, 9, 96, 96), 5, pix_fmt="yuvj420p")
    yield "h264 mp4 bt709", encode_video("libx264", "mp4", moving_picture(rng, 9, 96, 128), 5, color=(1, 1))
    yield "h264 mpegts", encode_video("libx264", "mpegts", moving_picture(rng, 30, 96, 128), 15)
    yield "mpeg4 mp4", encode_video("mpeg4", "mp4", moving_picture(rng, 40, 110, 150), 12)
    yield "mpeg4 avi", encode_video("mpeg4", "avi", moving_picture(rng, 40, 96, 128), 24)
    yield "vp8 webm", encode_video("libvpx", "webm", moving_picture(rng, 24, 90, 120), 12, options={"deadline": "realtime", "cpu-used": "8"})
    yield "vp9 webm", encode_video("libvpx-vp9", "webm", moving_picture(rng, 24, 90, 120), 12, options={"deadline": "realtime", "cpu-used": "8"})
    yield "h265 mp4", encode_video("libx265", "mp4", moving_picture(rng, 20, 96, 128), 10, options={"x265-params": "log-level=none", "preset": "ultrafast"})
    yield "av1 mp4", encode_video("libsvtav1", "mp4", moving_picture(rng, 12, 96, 128), 6, options={"preset": "12", "svtav1-params": "lp=1"})
    yield "mpeg4 avi, odd 4:2:0 size", encode_video("mpeg4", "avi", moving_picture(rng, 9, 77, 101), 5)
    yield "vp9 webm, odd 4:2:0 size", encode_video("libvpx-vp9", "webm", moving_picture(rng, 9, 75, 99), 5, options={"deadline": "realtime", "cpu-used": "8"})
    yield "h264 mp4 10 bit", encode_video("libx264", "mp4", moving_picture(rng, 9, 90, 122), 5, pix_fmt="yuv420p10le")
    yield "h265 mp4 10 bit bt2020", encode_video("libx265", "mp4", moving_picture(rng, 9, 96, 128), 5, pix_fmt="yuv420p10le", options={"x265-params": "log-level=none", "preset": "ultrafast"}, color=(9, 1))
    yield "h264 mp4 10 bit 422", encode_video("libx264", "mp4", moving_picture(rng, 9, 90, 122), 5, pix_fmt="yuv422p10le")
    yield "h264 mp4 10 bit 444", encode_video("libx264", "mp4", moving_picture(rng, 9, 91, 123), 5, pix_fmt="yuv444p10le")
    yield "mpeg4 avi, odd 4:2:0 height", encode_video("mpeg4", "avi", moving_picture(rng, 9, 77, 100), 5)
    yield "vp9 webm, odd 4:2:0 height", encode_video("libvpx-vp9", "webm", moving_picture(rng, 9, 75, 98), 5, options={"deadline": "realtime", "cpu-used": "8"})
    yield "vp9 webm, odd 4:2:0 width", encode_video("libvpx-vp9", "webm", moving_picture(rng, 9, 74, 99), 5, options={"deadline": "realtime", "cpu-used": "8"})
    yield "h264 mp4 gray", encode_video("libx264", "mp4", moving_picture(rng, 9, 90, 122), 5, pix_fmt="gray")
    yield "h264 mp4 wide", encode_video("libx264", "mp4", moving_picture(rng, 8, 360, 646), 4, options={"preset": "ultrafast"})
    yield "mpeg2 mpeg", encode_video("mpeg2video", "mpeg", moving_picture(rng, 30, 96, 128), 25)
    yield "mjpeg avi", encode_video("mjpeg", "avi", moving_picture(rng, 12, 80, 112), 8, pix_fmt="yuvj420p")


def check_videos(cpp, report, rng, processor):
    video_processor, prompts, videos_given = processor.video_processor, [], []
    for name, data in videos(rng):
        file = cpp.file("video", data)
        frames, metadata = reference_frames(data, video_processor.sample_frames)
        if metadata.total_num_frames == av.open(io.BytesIO(data)).streams.video[0].frames:  # then load_video itself works
            loaded, loaded_metadata = load_video(file, backend="pyav", sample_indices_fn=lambda metadata: video_processor.sample_frames(metadata))
            assert (loaded == frames).all() and loaded_metadata.fps == metadata.fps, name
        metadata.frames_indices = metadata.frames_indices.tolist()
        given = dict(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_metadata=True)
        theirs = video_processor(return_tensors="pt", **given)
        answer = cpp("video", file=file, out=cpp.path("patches"), frames_out=cpp.path("frames"), checkpoint=cpp.folder)
        if "error" in answer:
            report.equal(f"{name}", answer, "a video")
            continue
        report.equal(f"{name}: frame count", answer["total"], metadata.total_num_frames)
        report.equal(f"{name}: fps", answer["fps"], metadata.fps)
        report.equal(f"{name}: indices", answer["indices"], metadata.frames_indices)
        report.equal(f"{name}: frames", cpp.bytes("frames").reshape(answer["frame_count"], *frames.shape[1:]), frames)
        if name.endswith("odd 4:2:0 size"):  # bicubic resizing can make 2 levels of 1
            ours = cpp.bytes("frames").reshape(frames.shape).copy()
            theirs = video_processor(return_tensors="pt", **(given | {"videos": [ours]}))
        report.equal(f"{name}: grid", [answer["grid"]], theirs["video_grid_thw"].tolist())
        report.equal(f"{name}: patches", cpp.bytes("patches").reshape(-1, 1536), uint8_patches(theirs["pixel_values_videos"]))
        prompts.append(processor.replace_video_token(theirs, 0))
        videos_given.append((answer["grid"], answer["timestamps"]))
    text = "".join(f"clip {i}: <|vision_start|><|video_pad|><|vision_end|>" for i in range(len(prompts))) + "compare"
    expanded = processor.get_text_with_replacements([text], [], prompts, [])[0][0]
    check_prompt(cpp, report, "videos", text, expanded, [], videos_given)
    # an image between two videos
    text = "<|vision_start|><|video_pad|><|vision_end|>a<|vision_start|><|image_pad|><|vision_end|>b<|vision_start|><|video_pad|><|vision_end|>"
    expanded = processor.get_text_with_replacements([text], ["<|image_pad|>" * 35], prompts[:2], [])[0][0]
    check_prompt(cpp, report, "mixed", text, expanded, [[1, 10, 14]], videos_given[:2])


def check_frame_lists(cpp, report, rng, processor):
    """A video that came as a list of pictures: all shown, 24 fps unless said otherwise."""
    for count, fps in ((2, None), (5, 2.0), (8, 0.5), (3, 30.0)):
        pictures = [Image.fromarray(p) for p in moving_picture(rng, count, 100, 140)]
        files = [cpp.file(f"frame{i}", saved(p, "PNG")) for i, p in enumerate(pictures)]
        metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        theirs = processor.video_processor(videos=[np.stack([np.array(p) for p in pictures])], video_metadata=[metadata],
                                           do_sample_frames=False, return_metadata=True, return_tensors="pt")
        answer = cpp("frames", files=files, out=cpp.path("patches"), checkpoint=cpp.folder, **({"fps": fps} if fps else {}))
        report.equal(f"frames {count}: grid", [answer.get("grid", answer)], theirs["video_grid_thw"].tolist())
        report.equal(f"frames {count}: patches", cpp.bytes("patches").reshape(-1, 1536), uint8_patches(theirs["pixel_values_videos"]))
        text = "<|vision_start|><|video_pad|><|vision_end|>"
        expanded = processor.get_text_with_replacements([text], [], [processor.replace_video_token(theirs, 0)], [])[0][0]
        check_prompt(cpp, report, f"frames {count}", text, expanded, [], [(answer["grid"], answer["timestamps"])])


def check_config(cpp, report):
    """The same files read by both sides, for each way to spell them."""
    joint = {"image_processor": {**IMAGE_JSON, "size": {"shortest_edge": 1024, "longest_edge": 4096}},
             "video_processor": {**VIDEO_JSON, "fps": 4, "min_frames": 2, "max_frames": 16}}
    folders = {
        "released": {"preprocessor_config.json": IMAGE_JSON, "video_preprocessor_config.json": VIDEO_JSON},
        "older spelling": {"preprocessor_config.json": {**IMAGE_JSON, "min_pixels": 3136, "max_pixels": 99999},
                           "video_preprocessor_config.json": {**VIDEO_JSON, "min_pixels": 3136, "max_pixels": 99999}},
        "defaults": {"preprocessor_config.json": {}, "video_preprocessor_config.json": {}},
        "rescale": {"preprocessor_config.json": {**IMAGE_JSON, "rescale_factor": 0.005, "image_std": [0.3, 0.2, 0.1]},
                    "video_preprocessor_config.json": {**VIDEO_JSON, "do_rescale": False}},
        "joint": {"processor_config.json": joint, "preprocessor_config.json": {}},
        "image file alone": {"preprocessor_config.json": IMAGE_JSON},
    }
    for name, files in folders.items():
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                with open(os.path.join(folder, file), "w") as f:
                    json.dump(content, f)
            image, video = Qwen2VLImageProcessor.from_pretrained(folder), Qwen3VLVideoProcessor.from_pretrained(folder)
            ours = cpp("config", checkpoint=folder)
        theirs = {}
        for kind, p in (("image", image), ("video", video)):
            mean, std, _ = p._fuse_mean_std_and_rescale_factor(
                do_normalize=p.do_normalize, image_mean=p.image_mean, image_std=p.image_std, do_rescale=p.do_rescale,
                rescale_factor=p.rescale_factor)
            theirs[f"{kind}_mean"], theirs[f"{kind}_std"] = (torch.as_tensor(v, dtype=torch.float32).tolist() for v in (mean, std))
            theirs[f"{kind}_budget"] = [p.size.shortest_edge, p.size.longest_edge]
            theirs[f"{kind}_patch"] = p.patch_size
        theirs |= {"fps": video.fps, "min_frames": video.min_frames, "max_frames": video.max_frames}
        for key in ("image_mean", "image_std", "video_mean", "video_std"):
            ours[key] = np.array(ours.get(key, []), dtype=np.float32).tolist()
        report.equal(f"config {name}", ours, theirs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--qp_preprocess_dump", required=True)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print("seed", options.seed, flush=True)
    rng, report = np.random.default_rng(options.seed), Report()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cpp = Dump(options.qp_preprocess_dump, folder)
        for name, content in (("preprocessor_config.json", IMAGE_JSON), ("video_preprocessor_config.json", VIDEO_JSON)):
            with open(os.path.join(folder, name), "w") as f:
                json.dump(content, f)
        image_processor = Qwen2VLImageProcessor.from_pretrained(folder)
        video_processor = Qwen3VLVideoProcessor.from_pretrained(folder)
        processor = make_processor(image_processor, video_processor)
        for check in (lambda: check_config(cpp, report), lambda: check_decode(cpp, report, rng),
                      lambda: check_weights(cpp, report, rng), lambda: check_resize(cpp, report, rng),
                      lambda: check_smart_resize(cpp, report, rng), lambda: check_sampling(cpp, report, rng, video_processor),
                      lambda: check_images(cpp, report, rng, processor), lambda: check_frame_lists(cpp, report, rng, processor),
                      lambda: check_videos(cpp, report, rng, processor)):
            start, before = time.time(), report.checks
            check()
            name = check.__code__.co_names[0]
            print(f"{name}: {report.checks - before} checks, {time.time() - start:.1f} s", flush=True)
    print(f"{report.checks} checks, {len(report.failures)} different")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
