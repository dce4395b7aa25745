"""The committed digits checkpoint is what docs/examples/digits-checkpoint/README.md says it is."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from python_export import demo, validate

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "docs/examples/digits-checkpoint"
PICTURES = ROOT / "docs/examples/digits"


@pytest.fixture(scope="module")
def held_out():
    return json.loads((PICTURES / "held_out.json").read_text())


def test_the_checkpoint_is_complete_and_small():
    report = validate.validate(CHECKPOINT)
    assert validate.is_ok(report), report
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) < 4_000_000


def test_the_sprite_holds_every_sixth_digit_of_the_data_set(held_out):
    data = load_digits()
    assert held_out["index"] == [i for i in range(1797) if i % 6 == 0]
    assert held_out["label"] == [int(data.target[i]) for i in held_out["index"]]
    sprite = np.asarray(Image.open(PICTURES / "held_out.png"))
    for n, i in list(enumerate(held_out["index"]))[::17]:
        y, x = n // 20 * 64, n % 20 * 64
        small = Image.fromarray(np.rint(data.images[i] * 255 / 16).astype(np.uint8))
        assert np.array_equal(sprite[y:y + 64, x:x + 64], np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))), i


def test_single_pictures_are_cut_from_the_same_set(held_out):
    sprite = Image.open(PICTURES / "held_out.png")
    files = sorted(PICTURES.glob("[0-9]*-*.png"))
    assert len(files) == 20
    for file in files:
        index, word = file.stem.split("-")
        n = held_out["index"].index(int(index))
        assert demo.WORDS[held_out["label"][n]] == word
        x, y = n % 20 * 64, n // 20 * 64
        assert np.array_equal(np.asarray(Image.open(file).convert("L")), np.asarray(sprite.crop((x, y, x + 64, y + 64))))


def test_recorded_answers_give_the_documented_accuracy(held_out):
    right = sum(a == demo.answer([label]) for a, label in zip(held_out["answer"], held_out["label"]))
    assert right == 296 and len(held_out["answer"]) == 300
    assert "296 of 300, 98.7 %" in (CHECKPOINT / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_gives_the_recorded_answers_today(held_out, dtype):
    processor, model = demo.load(CHECKPOINT, dtype)
    for n in range(0, 300, 30):
        file = Image.open(PICTURES / "held_out.png")
        x, y = n % 20 * 64, n // 20 * 64
        picture = file.crop((x, y, x + 64, y + 64)).convert("RGB")
        assert demo.generate(processor, model, held_out["question"], [picture]) == held_out["answer"][n], n


def test_no_held_out_picture_is_trained_on(held_out):
    trained = demo.training_indices(1797)
    assert len(trained) == 1497 and not set(trained) & set(held_out["index"])


def test_batches_label_the_answer_and_nothing_else():
    processor, _ = demo.load(CHECKPOINT, torch.float32)
    images, labels = demo.load_pictures()
    kept = demo.training_indices(len(images))
    batch = demo.Batches(processor, images[kept], labels[kept], seed=1).sample(6, 0.5)
    for ids, target in zip(batch["input_ids"], batch["labels"]):
        said = processor.tokenizer.decode(ids[target != -100])
        assert said.endswith(".<|im_end|>") and said.startswith(("This is a", "These are a"))
        assert torch.equal(ids[target != -100], target[target != -100])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * len(batch["image_grid_thw"])


def test_articles_and_sentences():
    assert demo.answer([8]) == "This is an eight." and demo.answer([1]) == "This is a one."
    assert demo.answer([7, 8]) == "These are a seven and an eight."
