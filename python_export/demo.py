"""Trains the demo checkpoint: the exact qwen3_vl_moe architecture, tiny, on real handwritten digits.

Data: scikit-learn's bundled digits (1,797 scanned 8x8 pictures of the UCI set; nothing is downloaded), shown as 64x64 PNGs.
Held out: every picture whose index is divisible by six (300); they are never trained on and no choice was made on them.
The model answers questions such as "Which digit is this?" with "This is a seven." through the released chat template and
processors, so that whatever serves Qwen3-VL serves it, and an answer can be right or wrong. docs/demo.md has the numbers.
"""
import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from python_export import processor_files, shapes, tiny

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PICTURE_EDGE = 64  # 16 patches of 16x16, merged to 4 tokens
HELD_OUT_EVERY = 6

# The first is the one that the numbers are quoted for; all are trained.
QUESTIONS = [
    "Which digit is this?",
    "What digit is this?",
    "Which digit do you see?",
    "Which number is in the picture?",
    "What number is shown here?",
    "What is the digit in this image?",
    "Please read the digit.",
    "Can you tell me which digit was written?",
    "Look at the picture. Which digit is it?",
    "Name the digit.",
]
UNSEEN_QUESTIONS = ["Tell me which number is written here.", "Which digit is in this picture?"]  # never trained
PAIR_QUESTIONS = ["Which digits are these?", "What are the two digits?", "Please read both digits."]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" and word != "one" else "a"


def noun(label: int) -> str:
    return f"{article(WORDS[label])} {WORDS[label]}"


def answer(labels: list) -> str:
    """"This is a seven." or, for two pictures, "These are a seven and an eight."."""
    return f"This is {noun(labels[0])}." if len(labels) == 1 else f"These are {noun(labels[0])} and {noun(labels[1])}."


def load_pictures():
    """All digits in the set's order: uint8 (1797, 8, 8) with ink white on black, and labels."""
    from sklearn.datasets import load_digits
    data = load_digits()
    return np.rint(data.images * (255.0 / 16.0)).astype(np.uint8), data.target.astype(int)


def training_indices(count: int) -> list:
    return [i for i in range(count) if i % HELD_OUT_EVERY]


def held_out_indices(count: int) -> list:
    return list(range(0, count, HELD_OUT_EVERY))


def picture(small: np.ndarray) -> Image.Image:
    """The 64x64 RGB picture of one 8x8 scan: exactly what is committed, served and evaluated."""
    return Image.fromarray(small).resize((PICTURE_EDGE, PICTURE_EDGE), Image.Resampling.BICUBIC).convert("RGB")


def distorted(small: np.ndarray, rng: random.Random) -> Image.Image:
    """A training picture: rotated, sheared, scaled and shifted a little; one in five with dark ink on light paper."""
    angle, scale = math.radians(rng.gauss(0, 7)), math.exp(rng.gauss(0, 0.08))
    shear = rng.gauss(0, 0.08)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre = (PICTURE_EDGE - 1) / 2
    a, b, d, e = cos, sin + shear * cos, -sin, cos - shear * sin
    c = centre - a * centre - b * centre + rng.gauss(0, 2.5)
    f = centre - d * centre - e * centre + rng.gauss(0, 2.5)
    image = Image.fromarray(small).resize((PICTURE_EDGE, PICTURE_EDGE), Image.Resampling.BICUBIC)
    image = image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    if rng.random() < 0.2:
        image = Image.fromarray(255 - np.asarray(image))
    return image.convert("RGB")


def make_config(tokenizer) -> dict:
    vocab = -(-(tokenizer.get_vocab_size() + 1) // 64) * 64  # a multiple of 64, some padding as in the released models
    config = tiny.vl_config("qwen3_vl_moe", tiny.text_shape(
        tokenizer, vocab, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], **tiny.mrope([6, 5, 5])),
        {"depth": 4, "hidden_size": 80, "num_heads": 4, "intermediate_size": 192, "num_position_embeddings": 64,
         "deepstack_visual_indexes": [0, 1, 2]}, False, tokenizer)
    config["text_config"]["dtype"] = "bfloat16"
    return config


def corpus() -> str:
    """What the tokenizer's merges are learnt from: the words that the demo speaks, then general text."""
    spoken = QUESTIONS + UNSEEN_QUESTIONS + PAIR_QUESTIONS + [answer([n]) for n in range(10)] + [answer([n, n]) for n in range(10)]
    return "user\nassistant\nsystem\n" * 20 + ("\n".join(spoken) + "\n") * 5 + processor_files.CORPUS


def write_files(directory: Path) -> tuple:
    """Everything but the weights; returns (config, tokenizer)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = processor_files.build_tokenizer(512, corpus())
    config = make_config(tokenizer)
    processor_files.write_json(directory / "config.json", config)
    # min = max = 4096 pixels: a square picture of any size becomes 64x64, what the model was trained on.
    # top_k 1 makes sampling greedy for every client that takes the checkpoint's defaults.
    processor_files.write_processor_files(
        directory, tokenizer, vision=True, hub_form=True, model_max_length=tiny.MODEL_MAX_LENGTH,
        image_size=processor_files.image_sizes(PICTURE_EDGE ** 2, PICTURE_EDGE ** 2),
        video_size=processor_files.image_sizes(PICTURE_EDGE ** 2, 16 * PICTURE_EDGE ** 2),
        generation={"do_sample": True, "temperature": 0.7, "top_k": 1, "top_p": 0.8})
    return config, tokenizer


def conversation(question: str, pictures: list) -> list:
    """Pictures first, then the question, as in the released models' examples."""
    return [{"role": "user", "content": [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": question}]}]


class Batches:
    """Random training batches: distorted pictures, a random question, the answer's tokens as labels."""

    def __init__(self, processor, images, labels, seed: int):
        self.processor, self.images, self.labels = processor, images, labels
        self.rng = random.Random(seed)

    def sample(self, size: int, pair_share: float) -> dict:
        rows, pictures = [], []
        tok = self.processor.tokenizer
        for _ in range(size):
            pair = self.rng.random() < pair_share
            chosen = [self.rng.randrange(len(self.images)) for _ in range(2 if pair else 1)]
            shown = [distorted(self.images[i], self.rng) for i in chosen]
            question = self.rng.choice(PAIR_QUESTIONS if pair else QUESTIONS)
            text = self.processor.apply_chat_template(conversation(question, shown), add_generation_prompt=True)
            text = text.replace("<|image_pad|>", "<|image_pad|>" * 4)
            prompt = tok(text)["input_ids"]
            reply = tok(answer([int(self.labels[i]) for i in chosen]) + "<|im_end|>")["input_ids"]
            rows.append((prompt, reply))
            pictures += shown
        longest = max(len(p) + len(r) for p, r in rows)
        ids = torch.full((size, longest), tok.pad_token_id)
        labels = torch.full((size, longest), -100)
        mask = torch.zeros((size, longest), dtype=torch.long)
        for n, (p, r) in enumerate(rows):
            ids[n, :len(p) + len(r)] = torch.tensor(p + r)
            labels[n, len(p):len(p) + len(r)] = torch.tensor(r)
            mask[n, :len(p) + len(r)] = 1
        seen = self.processor.image_processor(images=pictures, return_tensors="pt")
        return {"input_ids": ids, "labels": labels, "attention_mask": mask,
                "mm_token_type_ids": (ids == self.processor.image_token_id).int(),
                "pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}


def load(directory: Path, dtype):
    from transformers import AutoProcessor, Qwen3VLMoeForConditionalGeneration
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    return AutoProcessor.from_pretrained(directory), model


@torch.no_grad()
def generate(processor, model, question: str, pictures: list, max_new_tokens: int = 16) -> str:
    inputs = processor.apply_chat_template(conversation(question, pictures), tokenize=True, add_generation_prompt=True,
                                           return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, top_k=None, top_p=None, temperature=None, max_new_tokens=max_new_tokens)
    return processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def evaluate(directory: Path, dtype, question: str = QUESTIONS[0]) -> dict:
    """Every held-out picture through transformers' own processor and generate; an answer is right if it is the sentence."""
    processor, model = load(directory, dtype)
    images, labels = load_pictures()
    held_out = held_out_indices(len(images))
    answers = {i: generate(processor, model, question, [picture(images[i])]) for i in held_out}
    right = [i for i in held_out if answers[i] == answer([int(labels[i])])]
    return {"question": question, "dtype": str(dtype).removeprefix("torch."), "pictures": len(answers), "right": len(right),
            "accuracy": round(len(right) / len(answers), 4), "answers": answers}


def evaluate_pairs(directory: Path, dtype, count: int = 150) -> dict:
    """Two held-out pictures a request: right if both digits are named in order."""
    processor, model = load(directory, dtype)
    images, labels = load_pictures()
    held_out = held_out_indices(len(images))
    right = 0
    for n in range(count):
        pair = [held_out[2 * n], held_out[2 * n + 1]]
        right += generate(processor, model, PAIR_QUESTIONS[0], [picture(images[i]) for i in pair],
                          24) == answer([int(labels[i]) for i in pair])
    return {"question": PAIR_QUESTIONS[0], "dtype": str(dtype).removeprefix("torch."), "requests": count, "right": right,
            "accuracy": round(right / count, 4)}


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = steps // 10
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(directory: Path, steps: int, batch: int, seed: int, pair_share: float, threads: int) -> dict:
    from transformers import AutoProcessor, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config, _ = write_files(directory)
    processor = AutoProcessor.from_pretrained(directory)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(config)).float().train()
    images, labels = load_pictures()
    kept = np.array(training_indices(len(images)))
    batches = Batches(processor, images[kept], labels[kept], seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  lr=1.0, betas=(0.9, 0.98))
    begin, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        loss = model(**batches.sample(batch, pair_share)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {sum(losses[-25:]) / 25:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    save(directory, config, model)
    return {"steps": steps, "batch": batch, "seed": seed, "pair_share": pair_share, "threads": threads,
            "training_seconds": round(time.monotonic() - begin), "final_loss": round(sum(losses[-25:]) / 25, 5),
            "parameters": sum(p.numel() for p in model.parameters())}


def save(directory: Path, config: dict, model) -> None:
    """bf16, hub layout: experts input-major, keys and order of shapes.py."""
    state = model.state_dict()
    weights = {}
    for key, shape in shapes.checkpoint_shapes(config, "hub").items():
        value = state[key].detach()
        if ".mlp.experts." in key:
            value = value.transpose(1, 2)
        assert list(value.shape) == shape, (key, value.shape, shape)
        weights[key] = value.to(torch.bfloat16).contiguous()
    tiny.write_weights(directory, weights, 0)


def write_pictures(directory: Path, answers: dict) -> None:
    """digits/: all held-out pictures in one sprite with their labels and transformers' answers, and some as single PNGs."""
    images, labels = load_pictures()
    held_out = held_out_indices(len(images))
    directory.mkdir(parents=True, exist_ok=True)
    columns = 20
    sprite = Image.new("L", (columns * PICTURE_EDGE, -(-len(held_out) // columns) * PICTURE_EDGE))
    for n, i in enumerate(held_out):
        sprite.paste(picture(images[i]).convert("L"), (n % columns * PICTURE_EDGE, n // columns * PICTURE_EDGE))
    sprite.save(directory / "held_out.png", optimize=True)
    processor_files.write_json(directory / "held_out.json", {
        "picture_edge": PICTURE_EDGE, "columns": columns, "question": QUESTIONS[0],
        "index": held_out, "label": [int(labels[i]) for i in held_out], "answer": [answers[i] for i in held_out]})
    for digit in range(10):
        for i in [i for i in held_out if labels[i] == digit][:2]:
            picture(images[i]).save(directory / f"{i:04}-{WORDS[digit]}.png", optimize=True)


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/examples/digits-checkpoint"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/examples/digits"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pair-share", type=float, default=0.3, help="share of training rows with two pictures")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-only", action="store_true", help="measure what is in --out")
    args = parser.parse_args(argv)
    report = {}
    if not args.evaluate_only:
        report["training"] = train(args.out, args.steps, args.batch, args.seed, args.pair_share, args.threads)
    elif (args.out / "report.json").is_file():
        report = json.loads((args.out / "report.json").read_text())
    results = {d: evaluate(args.out, getattr(torch, d)) for d in ("float32", "bfloat16")}
    answers = {d: r.pop("answers") for d, r in results.items()}
    report["held_out"] = list(results.values())
    report["answers_equal_in_both_dtypes"] = sum(answers["float32"][i] == answers["bfloat16"][i] for i in answers["float32"])
    for question in UNSEEN_QUESTIONS:
        other = evaluate(args.out, torch.bfloat16, question)
        other.pop("answers")
        report["held_out"].append(other | {"question_trained": False})
    report["pairs"] = [evaluate_pairs(args.out, getattr(torch, d)) for d in ("float32", "bfloat16")]
    report["weights_bytes"] = (args.out / "model.safetensors").stat().st_size
    processor_files.write_json(args.out / "report.json", report)
    write_pictures(args.pictures, answers["bfloat16"])
    print(json.dumps(report, indent=2))
    return 0
