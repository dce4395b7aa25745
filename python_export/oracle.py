"""What transformers 5.17.0 computes: the goldens that the C++ side is compared with (tests/parity).

A request is {"name", "messages": [...]} in the chat form, or {"name", "prompt": "raw text"}; content parts are
  {"type": "text", "text": ...}    {"type": "image", "image": PATH}    {"type": "video", "video": PATH}
  {"type": "video", "frames": [PATH, ...], "fps": 2.0}
Paths are relative to the requests file. A file is decoded with PyAV and its frames sampled by the video processor; of a list
of frames all are shown (transformers refuses to sample such lists). For each request the goldens hold, as safetensors:
  input_ids (n) i64                    the prompt after template, placeholders expanded
  position_ids (3, n) i64, rope_delta (1) i64
  patches_u8 (patches, 1536) u8        resized pixels in patch order before normalisation: images first, then videos
  pixel_values (patches, 1536) f32     normalised;  grid_thw (count, 3) i64, one row an image or video, same order
  visual.merged (tokens, hidden), visual.deepstack.K (tokens, hidden)
  logits (n, vocab) f32                of every prompt position, computed in one pass
  tokens (T) i64, step_logits (T, vocab) f32     greedy with a KV cache; nothing stops it
  hidden.N (n + T - 1, hidden)         input of decoder layer N (so DeepStack is in); hidden.L: output of the last one
and goldens.json beside them the prompt text, the vision inputs in prompt order, margins and versions. Activations keep the
model's dtype.
"""
import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch


@dataclass
class Golden:
    name: str
    prompt: str                      # decoded ids, special tokens kept
    vision: list = field(default_factory=list)   # in prompt order: {"grid", "runs": [[first token, count]], "patches": [begin, end]}
    tensors: dict = field(default_factory=dict)
    margins: list = field(default_factory=list)  # top-1 minus top-2 logit at each greedy step
    ulps: list = field(default_factory=list)     # the same in bf16 units in the last place of the top logit


def bf16_ulp(x: torch.Tensor) -> torch.Tensor:
    """Spacing of bf16 numbers (8 significant bits) at |x|."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(1e-30))) - 7)


def stable_topk(x: torch.Tensor, k: int, dim: int = -1) -> tuple:
    """torch.topk with a defined order among equals: the lowest index first."""
    values, order = torch.sort(x, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k).contiguous(), order.narrow(dim, 0, k).contiguous()


class Oracle:
    """`router_ties`: bf16 router logits tie exactly now and then, and torch.topk leaves open which of two equal experts it
    takes. "topk": whatever it does. "lowest": the lowest index, as our engine defines it; transformers' code otherwise."""

    def __init__(self, directory: Path, dtype=None, experts: str | None = None, attention: str = "sdpa",
                 router_ties: str = "topk"):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
        self.directory = Path(directory)
        config = json.loads((self.directory / "config.json").read_text())
        self.vision = "vision_config" in config
        auto = AutoModelForImageTextToText if self.vision else AutoModelForCausalLM
        self.model, info = auto.from_pretrained(directory, dtype=dtype or "auto", attn_implementation=attention,
                                                output_loading_info=True)
        bad = {k: v for k, v in info.items() if v}
        if bad:  # random weights in place of missing ones would still give goldens, and every test would pass against them
            raise RuntimeError(f"{directory}: transformers did not load every tensor: {bad}")
        if experts and hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation(experts)
        self.model.eval()
        self.ties_decided = 0  # rows for which "lowest" chose other experts than torch.topk would have
        if router_ties == "lowest":
            for module in self.model.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    module.forward = self.with_stable_topk(module.forward)
        self.processor = AutoProcessor.from_pretrained(directory) if self.vision else None
        self.tokenizer = self.processor.tokenizer if self.vision else AutoTokenizer.from_pretrained(directory)
        self.decoder = self.model.model.language_model if self.vision else self.model.model

    def with_stable_topk(self, forward):
        def routed(hidden):
            theirs = forward(hidden)
            with mock.patch.object(torch, "topk", stable_topk):
                ours = forward(hidden)
            self.ties_decided += int((theirs[2].sort(-1).values != ours[2].sort(-1).values).any(-1).sum())
            return ours
        return routed

    # --- inputs

    def prepare(self, request: dict, base: Path = Path(".")) -> dict:
        """The model's inputs, as transformers' own processor makes them."""
        if "prompt" in request:
            return dict(self.tokenizer(request["prompt"], return_tensors="pt"))
        if not self.vision:
            return dict(self.tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True,
                                                           return_tensors="pt"))
        images, videos, metadata = self.media(request, base)
        text = self.processor.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        return dict(self.processor(text=[text], images=images or None, videos=videos or None,
                                   **(self.as_sampled(metadata) if videos else {}), return_tensors="pt"))

    @staticmethod
    def as_sampled(metadata: list) -> dict:
        return {"video_metadata": metadata, "do_sample_frames": False}

    def media(self, request: dict, base: Path) -> tuple:
        from PIL import Image
        from transformers.image_utils import load_image
        from transformers.video_utils import VideoMetadata, load_video
        import numpy as np
        images, videos, metadata = [], [], []
        for message in request.get("messages", []):
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    images.append(load_image(str(base / part["image"])))
                elif part["type"] == "video" and "video" in part:
                    frames, sampled = load_video(
                        str(base / part["video"]), backend="pyav",
                        sample_indices_fn=lambda metadata, **_: self.processor.video_processor.sample_frames(metadata))
                    sampled.frames_indices = [int(i) for i in sampled.frames_indices]
                    videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
                    metadata.append(sampled)
                elif part["type"] == "video":
                    frames = [np.asarray(Image.open(base / f).convert("RGB")) for f in part["frames"]]
                    videos.append(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
                    metadata.append(VideoMetadata(total_num_frames=len(frames), fps=part["fps"],
                                                  frames_indices=list(range(len(frames)))))
        return images, videos, metadata

    def patches_u8(self, request: dict, base: Path) -> torch.Tensor | None:
        """The processors' output with normalisation off: bytes, comparable bit by bit."""
        images, videos, metadata = self.media(request, base) if self.vision else ([], [], [])
        raw = dict(do_rescale=False, do_normalize=False, return_tensors="pt")
        out = []
        if images:
            out.append(self.processor.image_processor(images=images, **raw)["pixel_values"])
        if videos:
            out.append(self.processor.video_processor(videos=videos, **self.as_sampled(metadata), **raw)["pixel_values_videos"])
        return torch.cat([p.to(torch.uint8) for p in out]) if out else None

    # --- outputs

    @contextmanager
    def tapped(self):
        """Yields {name: rows} filled by hooks while the model runs, unchanged; passes of one run are joined in order."""
        taps, handles = {}, []

        def keep(name, value):
            rows = value.detach().reshape(-1, value.shape[-1]).clone()
            taps[name] = torch.cat([taps[name], rows]) if name in taps else rows

        for n, layer in enumerate(self.decoder.layers):
            handles.append(layer.register_forward_pre_hook(
                lambda _, args, kwargs, n=n: keep(f"hidden.{n}", args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True))
        # The final norm's input is the last layer's output, DeepStack included should the model be that shallow.
        last = len(self.decoder.layers)
        handles.append(self.decoder.norm.register_forward_pre_hook(lambda _, args: keep(f"hidden.{last}", args[0])))
        if self.vision:  # images and videos pass the tower one after the other, in that order
            visual = self.model.model.visual
            for name, module in [("visual.merged", visual.merger)] + [
                    (f"visual.deepstack.{n}", m) for n, m in enumerate(visual.deepstack_merger_list)]:
                handles.append(module.register_forward_hook(lambda _, args, out, name=name: keep(name, out)))
        try:
            yield taps
        finally:
            for h in handles:
                h.remove()

    @torch.no_grad()
    def positions(self, inputs: dict) -> tuple:
        ids = inputs["input_ids"]
        if self.vision and (inputs.get("image_grid_thw") is not None or inputs.get("video_grid_thw") is not None):
            return self.model.model.get_rope_index(
                ids, inputs["mm_token_type_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"))
        return torch.arange(ids.shape[1]).expand(3, 1, -1), torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def greedy(self, inputs: dict, count: int, mask_padding: bool) -> tuple:
        """transformers' generate with a KV cache; returns (tokens, logits of every step, before masking)."""
        padding = list(range(self.token_limit(mask_padding), self.model.config.get_text_config().vocab_size))
        out = self.model.generate(
            **inputs, do_sample=False, top_k=None, top_p=None, temperature=None, repetition_penalty=None,
            suppress_tokens=padding or None, eos_token_id=None, pad_token_id=0, max_new_tokens=count, output_logits=True,
            return_dict_in_generate=True)
        return out.sequences[0, inputs["input_ids"].shape[1]:], torch.stack([s[0].float() for s in out.logits])

    def token_limit(self, mask_padding: bool) -> int:
        """Ids from here on are never taken. Released models' rows beyond the tokenizer are padding."""
        return len(self.tokenizer) if mask_padding else self.model.config.get_text_config().vocab_size

    def vision_items(self, inputs: dict) -> list:
        """Which placeholder runs, grid and patches belong to each image and video, in prompt order."""
        kinds = inputs["mm_token_type_ids"][0].tolist()  # 0 text, 1 image, 2 video
        grids = {1: inputs.get("image_grid_thw"), 2: inputs.get("video_grid_thw")}
        merge = self.model.config.vision_config.spatial_merge_size ** 2
        begin = {1: 0, 2: 0 if grids[1] is None else int(grids[1].prod(-1).sum())}
        queue = {k: [] if g is None else g.tolist() for k, g in grids.items()}
        items, position = [], 0
        while position < len(kinds):
            kind = kinds[position]
            if kind == 0:
                position += 1
                continue
            grid = queue[kind].pop(0)
            per_frame, runs = grid[1] * grid[2] // merge, []
            for _ in range(grid[0]):  # an image has one run, a video one a frame pair, with its time stamp between
                while kinds[position] != kind:
                    position += 1
                runs.append([position, per_frame])
                position += per_frame
            patches = grid[0] * grid[1] * grid[2]
            items.append({"grid": grid, "runs": runs, "patches": [begin[kind], begin[kind] + patches]})
            begin[kind] += patches
        return items

    def run(self, request: dict, count: int = 64, base: Path = Path("."), mask_padding: bool = True) -> Golden:
        inputs = self.prepare(request, base)
        ids = inputs["input_ids"][0]
        golden = Golden(request["name"], self.tokenizer.decode(ids))
        t = golden.tensors
        t["input_ids"] = ids
        positions, delta = self.positions(inputs)
        t["position_ids"], t["rope_delta"] = positions[:, 0], delta.reshape(1)
        pixels = [inputs[k] for k in ("pixel_values", "pixel_values_videos") if inputs.get(k) is not None]
        if pixels:
            t["pixel_values"] = torch.cat(pixels).float()
            t["grid_thw"] = torch.cat([inputs[k] for k in ("image_grid_thw", "video_grid_thw") if inputs.get(k) is not None])
            t["patches_u8"] = self.patches_u8(request, base)
            golden.vision = self.vision_items(inputs)
        with torch.no_grad():
            t["logits"] = self.model(**inputs, use_cache=False).logits[0].float()
        with self.tapped() as taps:
            t["tokens"], t["step_logits"] = self.greedy(inputs, count, mask_padding)
        t.update(taps)
        usable = t["step_logits"][:, :self.token_limit(mask_padding)]
        top = usable.topk(2, -1).values
        golden.margins = (top[:, 0] - top[:, 1]).tolist()
        golden.ulps = ((top[:, 0] - top[:, 1]) / bf16_ulp(top[:, 0])).tolist()
        return golden

    def describe(self) -> dict:
        import transformers
        text = self.model.config.get_text_config()
        return {"model": self.directory.name, "dtype": str(self.model.dtype).removeprefix("torch."),
                "attention": text._attn_implementation, "experts": getattr(text, "_experts_implementation", None),
                "transformers": transformers.__version__, "torch": torch.__version__, "tokenizer_size": len(self.tokenizer),
                "layers": len(self.decoder.layers)}


def write(out: Path, oracle: Oracle, goldens: list) -> None:
    from safetensors.torch import save_file
    out.mkdir(parents=True, exist_ok=True)
    for g in goldens:
        save_file({k: v.contiguous() for k, v in g.tensors.items()}, out / f"{g.name}.safetensors")
    (out / "goldens.json").write_text(json.dumps(oracle.describe() | {"requests": [
        {"name": g.name, "prompt": g.prompt, "vision": g.vision, "tokens": g.tensors["tokens"].tolist(), "margins": g.margins,
         "bf16_ulps": g.ulps} for g in goldens]}, indent=1) + "\n")


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export oracle", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True, help="JSON list of requests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's own")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--experts", choices=["eager", "grouped_mm", "batched_mm"], help="default: transformers' own choice")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    oracle = Oracle(args.model, getattr(torch, args.dtype) if args.dtype else None, args.experts, args.attention)
    requests = json.loads(args.requests.read_text())
    write(args.out, oracle, [oracle.run(r, args.tokens, args.requests.parent) for r in requests])
    print(json.dumps(oracle.describe()), file=sys.stderr)
    return 0
