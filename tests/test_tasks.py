"""Tasks: batches depend on the step alone, text is split by file, errors are one line."""

import gzip
import io
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from offload_trainer.batches import batch_rows, pieces, shard
from offload_trainer.errors import UserError
from offload_trainer.tasks import causal_lm, custom, image_classification, text
from offload_trainer.tasks.images import channels_of, crop_and_flip, decode, random_box
from offload_trainer.tasks.labelled import from_datasets, read_images
from offload_trainer.tasks.loaders import LoaderBatches
from offload_trainer.tasks.task import Shuffle
from offload_trainer.tasks.tokens import byte_tokenizer
from tests.language import LLAMA, lm_config, message, with_memory, write_texts


def image_config(data, **changes) -> SimpleNamespace:
    fields = {"model": "resnet32", "width": 0.5, "data": str(data), "image_size": 32, "batch_size": 4, "workers": 0}
    return SimpleNamespace(
        **{**fields, "augment": True, "label_smoothing": 0.0, "classes": None, "limit": None, **changes}
    )


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))


# --- order and sharding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (12, 4), (2, 5), (7, 7)])
def test_every_epoch_visits_every_item_once_in_a_new_order(size, batch_size):
    order = Shuffle(size, batch_size, seed=3)
    steps = [order.indices(step) for step in range(3 * size)]
    assert all(len(step) == batch_size for step in steps)
    epochs = torch.cat(steps).split(size)
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in epochs)
    if size > 2:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    again = Shuffle(size, batch_size, seed=3)
    assert all(torch.equal(again.indices(step), steps[step]) for step in reversed(range(3 * size)))
    assert not torch.equal(torch.cat([Shuffle(50, 50, seed).indices(0) for seed in (0, 1)])[:50], torch.arange(50))


def test_shards_put_together_are_the_batch():
    batch = {"x": torch.arange(12).view(6, 2), "more": (torch.arange(6), [torch.ones(6, 1)]), "none": None}
    parts = [shard(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["more"][1][0] for part in parts]), batch["more"][1][0])
    assert isinstance(parts[0]["more"], tuple) and parts[0]["none"] is None
    assert batch_rows(parts[0]) == 2
    with pytest.raises(UserError) as error:
        shard(torch.zeros(32, 2), 0, 3)
    assert message(error) == "task.batch_size (32) must be divisible by the number of processes (3)"
    with pytest.raises(UserError, match="holds int"):
        shard((torch.zeros(2), 3), 0, 1)


def test_pieces_put_together_are_the_batch():
    batch = {"x": torch.arange(14).view(7, 2), "more": (torch.arange(7), None)}
    parts = pieces(batch, 3)
    assert [batch_rows(part) for part in parts] == [3, 2, 2] and parts[0]["more"][1] is None
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["more"][0] for part in parts]), batch["more"][0])
    assert pieces(batch, None) == [batch] and len(pieces(batch, 7)) == len(pieces(batch, 9)) == 1
    for whole in ((torch.zeros(4), torch.zeros(3)), [torch.zeros(4), "words"], "words"):  # no number of rows is all's
        assert pieces(whole, 2) == [whole]


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_text_is_split_by_file_without_overlap(texts):
    documents = text.read_documents(text.find_documents(str(texts)))
    assert len(documents) == 20  # neither the hidden nor the binary file
    train, val = text.split(documents, 0.25)
    assert sorted(train + val) == sorted(content for _, content in documents)
    assert not set(train) & set(val)
    total = sum(map(len, train + val))
    assert 0.15 * total < sum(map(len, val)) <= 0.25 * total
    assert text.split(documents[::-1], 0.25)[1] == val[::-1]  # whatever order they were found in
    assert text.split([("only", b"abcdefgh")], 0.25) == ([b"abcdef"], [b"gh"])
    assert [len(part) for part in text.split(documents[:2], 0.01)] == [1, 1]


def test_packed_blocks_hold_the_whole_row(texts):
    row = text.pack([b"abc", b"defg"], None)
    assert bytes(row.tolist()) == b"abc\ndefg\n"
    cut = text.blocks(row, 4)
    assert [bytes(block.tolist()) for block in cut] == [b"abc\nd", b"defg\n"]
    assert text.blocks(row, 9).shape == (0, 10)


def test_text_batches_depend_on_seed_and_step_alone(texts):
    one, two = (causal_lm.build(lm_config(texts), seed=5) for _ in range(2))
    wanted = {step: one.train[step] for step in (0, 1, 2, 40, 41)}
    assert all(torch.equal(two.train[step], wanted[step]) for step in (41, 2, 40, 0, 1))
    assert not torch.equal(causal_lm.build(lm_config(texts), seed=6).train[0], wanted[0])
    assert wanted[0].shape == (4, 17) and wanted[0].dtype == torch.int64
    assert one.count(wanted[0]) == 4 * 16 and one.unit == "tokens"
    assert len(one.val) == 3 and equal(one.val, two.val)

    letters = [set(torch.cat(list(part)).unique().tolist()) - {10} for part in (one.val, wanted.values())]
    assert not letters[0] & letters[1]
    blocks = one.train.blocks
    epochs = torch.cat([one.train[step] for step in range(len(blocks))])  # four, as a batch has four
    assert Counter(map(tuple, epochs.tolist())) == Counter(map(tuple, blocks.tolist() * 4))


def test_the_standard_library_is_text():
    documents = text.find_documents("stdlib")
    assert len(documents) > 300 and ("argparse.py", documents[0][1].parent / "argparse.py") in documents
    assert not any("site-packages" in name or name.startswith("test/") for name, _ in documents)


def test_a_tokenizer_folder_is_used_and_exported(texts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1, **{chr(65 + n) * (90 + n): n + 2 for n in range(20)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    config = lm_config(texts, tokenizer=str(tmp_path / "tokenizer"), sequence=2, batch_size=1)
    task = causal_lm.build(config, seed=0)
    tokens = task.train.blocks.flatten()
    assert tokens.dtype == torch.int32 and 0 in tokens and 1 not in tokens
    export = tmp_path / "export"
    export.mkdir()
    model = with_memory(task.model)
    task.materialise(model)
    task.save_export(model, export)
    assert AutoTokenizer.from_pretrained(export).eos_token_id == 0
    assert (export / "generation_config.json").is_file()
    with pytest.raises(UserError, match=r"vocab_size \(8\) must be at least the tokenizer's \(22\)"):
        causal_lm.build(SimpleNamespace(**{**vars(config), "model": {**LLAMA, "vocab_size": 8}}), seed=0)


def test_documents_begin_and_end_as_the_tokenizer_would_have_it():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    for template, end, expected in (
        (None, "</s>", [3, 4, 1, 4, 1]),
        ("<s> $A", "</s>", [0, 3, 4, 1, 0, 4, 1]),  # as Llama and Gemma
        ("<s> $A </s>", "</s>", [0, 3, 4, 1, 0, 4, 1]),  # one end, not two
        ("<s> $A", None, [0, 3, 4, 2, 0, 4, 2]),  # the encoding of a newline
    ):
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
        if template is not None:
            special = [("<s>", 0), ("</s>", 1)]
            raw.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end)
        assert text.pack([b"a b", b"b"], tokenizer).tolist() == expected


def test_a_model_folders_own_tokenizer_is_used(texts, tmp_path):
    """Not given: the folder's own. bytes: bytes. A new model: bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"task.model \(.*\) has no tokenizer in it .*: give task.tokenizer"):
        causal_lm.build(lm_config(texts, model=str(tmp_path / "model")), seed=0)
    by_bytes = causal_lm.build(lm_config(texts, model=str(tmp_path / "model"), tokenizer="bytes"), seed=0)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(tmp_path / "model")
    own = causal_lm.build(lm_config(texts, model=str(tmp_path / "model")), seed=0)
    rows = [task.train.blocks.flatten().long() for task in (own, by_bytes)]
    assert torch.equal(rows[0].where(rows[0] != ord("a"), 10), rows[1])  # each document ends with the eos token
    assert torch.equal(causal_lm.build(lm_config(texts), seed=0).train.blocks.flatten().long(), rows[1])


def test_perplexity_is_e_to_the_mean_loss(texts):
    task = causal_lm.build(lm_config(texts), seed=0)
    assert task.report({"loss": 2.0, "accuracy": 0.5}) == {
        "loss": 2.0, "accuracy": 0.5, "perplexity": pytest.approx(7.389056)
    }  # fmt: skip
    assert task.report({"loss": 1e4})["perplexity"] == float("inf")
    assert np.isnan(task.report({"loss": float("nan")})["perplexity"])


def test_loss_is_the_mean_over_shifted_tokens(texts):
    task = causal_lm.build(lm_config(texts), seed=0)
    model = with_memory(task.model)
    torch.manual_seed(0)
    task.materialise(model)
    batch = task.val[0]
    with torch.no_grad():
        found = task.metrics_fn(model, batch)
        wanted = model(input_ids=batch, labels=batch).loss
        model(**task.example_inputs)
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(task.loss_fn(model, batch), found["loss"])
    assert 0 <= found["accuracy"] <= 1


# --- errors of language models ---------------------------------------------------------------------------------------


def test_bad_models_are_one_line(texts, tmp_path):
    def refused(model: dict, **changes) -> str:
        with pytest.raises(UserError) as error:
            causal_lm.build(lm_config(texts, model=model, **changes), seed=0)
        return message(error)

    assert "task.model.hidden_sizee is not a field of LlamaConfig" in refused({**LLAMA, "hidden_sizee": 3})
    assert "task.model.model_type (lama)" in refused({**LLAMA, "model_type": "lama"})
    assert "not a multiple" in refused({**LLAMA, "hidden_size": 33})
    assert "vocab_size (100) must be at least the tokenizer's (256, bytes)" in refused({**LLAMA, "vocab_size": 100})
    assert "task.sequence (65) must be at most" in refused(LLAMA, sequence=65)
    assert "task.tokenizer" in refused(LLAMA, tokenizer=str(tmp_path / "none"))


def test_bad_text_is_one_line(texts, tmp_path):
    def refused(data, **changes) -> str:
        with pytest.raises(UserError) as error:
            causal_lm.build(SimpleNamespace(**{**vars(lm_config(texts, **changes)), "data": data}), seed=0)
        return message(error)

    assert f"task.data ({tmp_path}/none) does not exist" in refused(f"{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused("")
    assert "holds no text files" in refused([str(texts), str(tmp_path / "empty")])
    (tmp_path / "empty" / "binary").write_bytes(b"\0" * 100)
    assert "none of its 1 files is text" in refused(str(tmp_path / "empty"))
    _, val = text.split(text.read_documents(text.find_documents(str(texts))), 0.25)
    sequences = (sum(len(content) + 1 for content in val) - 1) // 16
    wanted = f"gives {sequences} validation sequences of task.sequence (16) tokens; one batch (task.batch_size) is 64"
    assert wanted in refused(str(texts), batch_size=64)


# --- images ---------------------------------------------------------------------------------------------------------


def make_folder(root: Path, size: int = 32, mode: str = "RGB", count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size + number, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{number}.jpg")
    return root


def test_a_folder_and_a_tar_of_it_are_the_same_data(tmp_path):
    folder = make_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="some/where")
    tasks = [
        image_classification.build(image_config(data, **changes), seed=1)
        for data in (folder, tmp_path / "images.tar.gz")
        for changes in ({}, {"workers": 2})
    ]
    steps = [[task.train[step] for step in (0, 1, 2, 7, 7, 3)] for task in tasks]
    assert all(equal(other, steps[0]) for other in steps[1:])
    assert all(equal(list(other.val), list(tasks[0].val)) for other in tasks[1:])
    images, labels = steps[0][0]
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32 and labels.shape == (4,)
    whole = image_classification.build(image_config(folder, augment=False, batch_size=12), seed=1)
    assert whole.train[0][0].mean((0, 2, 3)).abs().max() < 1e-4
    assert sorted(whole.train[0][1].tolist()) == [0] * 6 + [1] * 6
    assert [tasks[0].count(batch) for batch in tasks[0].val] == [4, 4, 4]


def test_large_images_are_cropped_alike_whatever_the_threads(tmp_path):
    folder = make_folder(tmp_path / "images", size=100, count=2)
    one, two = (
        image_classification.build(image_config(folder, image_size=72, workers=n, model="resnet50", width=0.1), 1)
        for n in (0, 3)
    )
    assert equal([one.train[step] for step in (5, 0, 1)], [two.train[step] for step in (5, 0, 1)])
    assert not equal(one.train[0][0], one.train[1][0])
    assert equal(list(one.val), list(two.val)) and one.val[0][0].shape == (4, 3, 72, 72)
    for draws in np.random.default_rng(0).random((200, 10, 4)):
        left, upper, right, lower = random_box(60, 40, draws)
        assert 0 <= left < right <= 60 and 0 <= upper < lower <= 40


def test_each_augmented_image_is_a_crop_of_the_padded_one_perhaps_mirrored():
    pixels = torch.randint(1, 256, (32, 8, 8, 3), dtype=torch.uint8)
    found = crop_and_flip(pixels, np.random.default_rng(2))
    assert torch.equal(found, crop_and_flip(pixels, np.random.default_rng(2)))
    padded = torch.nn.functional.pad(pixels, (0, 0, 4, 4, 4, 4))
    mirrored = 0
    for image, whole in zip(found, padded, strict=True):
        crops = [whole[y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
        plain = any(torch.equal(image, crop) for crop in crops)
        flipped = any(torch.equal(image, crop.flip(1)) for crop in crops)
        assert plain or flipped
        mirrored += flipped and not plain
    assert 6 < mirrored < 26


def test_idx_files_are_grey_and_the_model_takes_one_channel(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 6)):
        pixels, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 3
        head = b"\0\0\x08\x03" + np.array([count, 28, 28], dtype=">u4").tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        head = b"\0\0\x08\x01" + np.array([count], dtype=">u4").tobytes()
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        if prefix == "train":
            kept = pixels
    task = image_classification.build(image_config(tmp_path, image_size=28, augment=False, batch_size=12), seed=0)
    images, labels = task.train[0]
    restored = (images * kept.std(ddof=1) / 255 + kept.mean() / 255) * 255
    assert Counter(image.round().byte().numpy().tobytes() for image in restored) == Counter(map(bytes, kept))
    model = task.model.to_empty(device="cpu")
    task.materialise(model)
    assert model(*task.example_inputs).shape == (3, 3)
    found = task.metrics_fn(model, (images, labels))
    assert torch.equal(task.loss_fn(model, (images, labels)), found["loss"])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x07abc")
    with pytest.raises(UserError, match="is not a whole idx file"):
        read_images(str(tmp_path))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    shades = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(shades).save(tmp_path / f"image.{suffix}")
    item = str(tmp_path / f"image.{suffix}")
    assert channels_of(item) == 1
    grey = np.asarray(decode(item))
    assert grey.dtype == np.uint8 and np.array_equal(grey, shades >> 8)


def test_pixels_of_32_bits_that_use_8_are_those(tmp_path):
    shades = np.arange(256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "image.tif")
    assert np.array_equal(np.asarray(decode(str(tmp_path / "image.tif"))), shades)
    assert channels_of(str(tmp_path / "image.tif")) == 1


@pytest.mark.parametrize(
    ("dtype", "value", "kind"), [("float32", 1, "floating-point"), ("int32", 300, "32-bit"), ("uint16", 255, "16-bit")]
)
def test_pixels_of_no_known_range_are_refused(tmp_path, dtype, value, kind):
    Image.fromarray(np.full((4, 4), value, dtype)).save(tmp_path / "image.tif")
    with pytest.raises(UserError) as error:
        decode(str(tmp_path / "image.tif"))
    assert f"image.tif cannot be decoded (its pixels are {kind} numbers of no known range: save it" in message(error)


def test_limit_keeps_a_few_of_every_class(tmp_path):
    folder = make_folder(tmp_path / "images", count=20)
    task = image_classification.build(image_config(folder, limit=10), seed=0)
    assert len(task.train.source.labels) == 10 and set(task.train.source.labels.tolist()) == {0, 1}
    assert sum(task.count(batch) for batch in task.val) == 10


def test_hub_datasets_are_read_by_their_features(monkeypatch):
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 9).save(buffer, "png")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [{"bytes": buffer.getvalue(), "path": None}] * 4, "label": [0, 1, 1, 0]}
    part = datasets.Dataset.from_dict(rows, features=features)
    train, val, names = from_datasets("x", datasets.DatasetDict(train=part, test=part))
    assert names == ["a", "b"] and train.labels.tolist() == [0, 1, 1, 0] and val.items[3] == buffer.getvalue()
    with pytest.raises(UserError, match=r"task\.data \(x\) must have the splits"):
        from_datasets("x", datasets.DatasetDict(train=part))

    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        read_images("someone/something")
    assert message(error) == (
        "task.data (someone/something) does not exist here, and cannot be had from the hub either (no network)"
    )


def test_bad_image_data_is_one_line(tmp_path):
    def refused(data, **changes) -> str:
        with pytest.raises(UserError) as error:
            image_classification.build(image_config(data, **changes), seed=0)
        return message(error)

    assert "does not exist" in refused(tmp_path / "none")
    assert "must hold train/CLASS/" in refused(tmp_path)
    (tmp_path / "broken.tar.gz").write_bytes(b"junk")
    assert "is not a whole tar archive" in refused(tmp_path / "broken.tar.gz")
    folder = make_folder(tmp_path / "images")
    assert "task.classes (1) must be at least the 2 classes" in refused(folder, classes=1)
    assert "task.image_size (8) must be at least 16 for vgg19_bn" in refused(folder, image_size=8, model="vgg19_bn")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "wasp").mkdir()
    assert f"task.data ({folder}): train/wasp holds no images: add some, or remove it" in refused(folder)
    (folder / "train" / "wasp").rmdir()
    (folder / "train" / "bee" / "0.jpg").write_bytes(b"junk")
    assert "bee/0.jpg cannot be decoded" in refused(folder)
    (folder / "test" / "bee").rename(folder / "test" / "cat")
    assert "test/cat is a class that train/ does not have" in refused(folder)


# --- custom ---------------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Samples with random augmentation, drawn from the global generators as users do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), np.random.random()])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5.0))


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_plain_loader_gives_the_same_step_whenever_asked(generator):
    def loader() -> DataLoader:
        return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator)

    straight = LoaderBatches(loader(), "train", seed=1)
    wanted = []
    for step in range(9):
        wanted.append(straight[step])
        torch.manual_seed(step)  # the training draws, too
        np.random.seed(step)
    assert sorted(torch.cat(wanted[:3])[:, 0].tolist()) == list(range(10))
    assert not torch.equal(wanted[0], wanted[3])
    before = torch.get_rng_state()
    resumed = LoaderBatches(loader(), "train", seed=1)
    for step in (5, 6, 6, 7, 2, 0, 8):
        assert torch.equal(resumed[step], wanted[step])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(LoaderBatches(loader(), "train", seed=2)[0], wanted[0])


def test_a_loader_without_length_goes_round():
    steps = LoaderBatches(DataLoader(Stream(), batch_size=2), "train", seed=0)
    assert [steps[step].tolist() for step in (2, 3, 4, 0)] == [[4.0], [0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]


def problem(**changes):
    data = TensorDataset(torch.randn(10, 4), torch.arange(10) % 2)
    found = {
        "model": nn.Linear(4, 2),
        "train": DataLoader(data, batch_size=5, shuffle=True),
        "val": DataLoader(data, batch_size=4),
        "loss": lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not ...}


def accuracy(module, batch):
    return (module(batch[0]).argmax(-1) == batch[1]).float().mean()


@pytest.fixture
def run_custom(tmp_path, monkeypatch):
    """Builds the task of a function, in a module of the current folder, that returns what it is told to."""
    code = "import sys\ndef make(size=1):\n    return sys.modules['own_task_box'].returned\n"
    (tmp_path / "own_task_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(returned, function="own_task_module:make", **arguments):
        monkeypatch.setitem(sys.modules, "own_task_box", SimpleNamespace(returned=returned))
        return custom.build(SimpleNamespace(function=function, arguments=arguments), seed=0)

    yield run
    sys.modules.pop("own_task_module", None)


def test_a_custom_task_trains_on_plain_loaders(run_custom):
    task = run_custom(problem(metric=accuracy), size=3)
    assert isinstance(task.example_inputs, tuple) and task.example_inputs[0].shape == (3, 4)
    assert task.model(*task.example_inputs).shape == (3, 2)
    assert [task.count(batch) for batch in task.val] == [4, 4, 2] and task.unit == "samples"
    assert set(task.metrics_fn(task.model, task.val[0])) == {"loss", "accuracy"}
    assert task.loss_fn(task.model, task.train[7]).shape == ()
    assert equal(list(task.val), list(task.val)) and equal(task.val[1:], list(task.val)[1:])
    assert run_custom(task) is task
    batches = [torch.ones(2, 4), torch.zeros(2, 4)]
    task = run_custom(problem(train=batches, val=batches))
    assert torch.equal(task.train[3], batches[1]) and len(task.val) == 2


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1, 2], "must return a Task or a dict with model, train, val, loss; it returned list"),
        (problem(loss=...), "lacks loss"),
        (problem(metrics=accuracy), "has the unknown metrics"),
        (problem(model="resnet"), "model must be an nn.Module; it is str"),
        (problem(model=nn.Linear(4, 2, device="meta")), "on meta"),
        (problem(loss=3), "loss must be a function of (module, batch); it is int"),
        (problem(train=3), "train must be a DataLoader"),
        (problem(train=iter([torch.ones(2)])), "train must be a DataLoader"),
        (problem(train=[]), "train is empty"),
        (problem(val=[]), "val is empty"),
        (problem(train=[(torch.ones(2), 1)]), "train: a batch holds int"),
        (problem(example_inputs=torch.ones(3, 4)), "example_inputs must be a tuple or a dict"),
    ],
)
def test_a_wrong_return_names_the_function_and_what_came_back(run_custom, returned, words):
    with pytest.raises(UserError) as error:
        run_custom(returned)
    assert "own_task_module:make" in message(error) and words in message(error)


def test_a_function_that_cannot_be_called_is_named(run_custom):
    for function, arguments, words in (
        ("no_such_module:make", {}, "no_such_module cannot be imported"),
        ("own_task_module:none", {}, "own_task_module has no function none"),
        ("own_task_module", {}, "must be package.module:function"),
        ("own_task_module:make", {"sise": 3}, "task.arguments (sise) do not fit"),
    ):
        with pytest.raises(UserError) as error:
            run_custom(problem(), function, **arguments)
        assert words in message(error)
    task = run_custom(problem(loss=lambda module, batch: module(batch[0]).mean(-1)))
    with pytest.raises(UserError, match=r"loss must return a scalar tensor; it returned a tensor of shape \(5,\)"):
        task.loss_fn(task.model, task.train[0])
