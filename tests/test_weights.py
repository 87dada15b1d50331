"""Weights arrive bit for bit, whatever dtype, shards and layout they are stored in, and without a second copy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from offload_trainer import offloader as offloader_module
from offload_trainer.errors import UserError
from offload_trainer.files import reading
from offload_trainer.files.reading import read_header
from offload_trainer.run import main
from offload_trainer.tasks import causal_lm
from offload_trainer.tasks.stored import stored_tensors
from offload_trainer.tasks.tokens import byte_tokenizer
from offload_trainer.tasks.weights import Weights, _forget_initialised, materialise
from tests.language import LLAMA, lm_config, message, with_memory, write_texts
from tests.runs import config

EXPERTS = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 12, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 2, "head_dim": 8},
}
"""More than 9 experts: sorted as text, expert 10 comes before expert 2."""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def build(folder: Path, data: Path):
    return causal_lm.build(lm_config(data, model=str(folder), tokenizer="bytes"), seed=0)


def equal_logits(model: nn.Module, other: nn.Module) -> bool:
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():
        return torch.equal(model.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_model_is_initialised_as_transformers_does(texts, tied):
    def fresh(seed: int) -> nn.Module:
        task = causal_lm.build(lm_config(texts, model={**LLAMA, "tie_word_embeddings": tied}), 0)
        model = with_memory(task.model)
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        torch.manual_seed(seed)
        task.materialise(model)
        assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        return model

    model, twin, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    reference = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    reference.load_state_dict(model.state_dict())
    assert equal_logits(model, reference)  # only if the rotary frequencies, which no state dict holds, are right
    if not tied:
        _forget_initialised(reference)
        torch.manual_seed(1)
        reference.initialize_weights()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_streamed_weights_equal_from_pretrained(texts, tmp_path, tied, shard_size, dtype):
    torch.manual_seed(0)
    saved = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).to(dtype)
    saved.save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file() == (shard_size == "30KB")
    for wanted in (torch.float32, torch.bfloat16):  # the master's
        task = build(tmp_path / "model", texts)
        model = with_memory(task.model.to(wanted))
        task.materialise(model)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=wanted)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        if wanted == torch.float32:
            assert equal_logits(model, reference)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("layout", ["a tensor per expert", "merged"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_experts_are_merged_as_transformers_does(texts, tmp_path, kind, layout, shard_size):
    torch.manual_seed(0)
    model_config = AutoConfig.for_model(**{**LLAMA, **EXPERTS[kind], "model_type": kind})
    saved = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    apart = layout == "a tensor per expert"
    saved.save_pretrained(tmp_path / "model", max_shard_size=shard_size, save_original_format=apart)
    names = {one.name for one in stored_tensors(tmp_path / "model")}
    assert any(".experts.11." in name for name in names) == apart
    task = build(tmp_path / "model", texts)
    model = with_memory(task.model)
    task.materialise(model)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
    assert equal_logits(model, reference)


def test_an_expert_that_is_missing_is_named(texts, tmp_path):
    model_config = AutoConfig.for_model(**{**LLAMA, **EXPERTS["mixtral"], "model_type": "mixtral"})
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if ".experts.3.w2" in name)]
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        build(tmp_path / "model", texts)
    assert "missing: model.layers.0.mlp.experts.down_proj" in message(error)


def test_names_without_the_base_prefix_are_found(texts, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.model.save_pretrained(tmp_path / "base")
    model.config.save_pretrained(tmp_path / "base")
    task = build(tmp_path / "base", texts)
    loaded = with_memory(task.model)
    task.materialise(loaded)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tied_tensors_that_differ_are_refused_when_read(texts, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    task = build(tmp_path / "model", texts)
    with pytest.raises(UserError) as error:
        task.materialise(with_memory(task.model))
    assert "set tie_word_embeddings to false" in message(error)


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_every_dtype_and_shape_is_read_as_the_library_reads_it(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for shape in ((), (0, 3), (1,), (5, 3), (2, 3, 4)):
            tensors[f"{dtype} {shape}"] = torch.randn(shape, generator=generator).to(dtype)
    tensors |= {"int": torch.arange(9).view(3, 3), "bool": torch.tensor([True, False, True])}
    save_file(tensors, tmp_path / "file.safetensors")
    with open(tmp_path / "file.safetensors", "rb", buffering=0) as handle:
        for one in read_header(tmp_path / "file.safetensors"):
            value = tensors[one.name]
            for dtype in {value.dtype, *([torch.float32, torch.bfloat16] if value.is_floating_point() else ())}:
                target = torch.full(value.shape, 1, dtype=dtype)
                one.read_into(handle, target)
                assert torch.equal(target, value.to(dtype)), one
                assert one.equals(handle, target)
                if value.numel():
                    target.view(-1)[-1] = 1 - target.view(-1)[-1].to(torch.float64)
                    assert not one.equals(handle, target)
                if value.ndim == 2:
                    turned = torch.ones(value.shape[::-1], dtype=dtype).t()
                    one.read_into(handle, turned)
                    assert torch.equal(turned, value.to(dtype))


LOADING = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from offload_trainer.master import Master, StateSpec
from offload_trainer.tasks.stored import stored_tensors
from offload_trainer.tasks.weights import Weights, materialise


def resident(key):  # bytes. Not ru_maxrss: a process inherits that of its parent.
    return 1024 * int(open("/proc/self/status").read().split(key)[1].split()[0])


folder = Path(sys.argv[1])
for dtype in (torch.bfloat16, torch.float32):  # the larger one last: what is measured is the peak of the process
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    weights = Weights.match(stored_tensors(folder), model)
    before = resident("VmRSS:")
    master = Master(model, StateSpec({}, {}, None), materialise=lambda model: materialise(model, weights.load))
    after = resident("VmHWM:")
    largest = max(tensor.nbytes for tensor in master.tensors.values())
    print(after - before, master.nbytes, largest, float(model.model.layers[5].mlp.up_proj.weight[0, 0]))
    master.close()
    del master, model
"""


def test_loading_takes_the_slab_and_one_tensor(tmp_path):
    """In a process of its own, whose largest resident size is counted, mapped files included. 100 M parameters."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 2048}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    model.config.save_pretrained(tmp_path)
    weight_map = {}
    for layer in range(6):
        file = f"model-{layer + 1:05d}-of-00006.safetensors"
        state = model.state_dict().items()
        held = {n: t for n, t in state if f"layers.{layer}." in n or (layer == 0 and ".layers." not in n)}
        stored_values = {n: torch.full(t.shape, layer + 0.5, dtype=torch.bfloat16) for n, t in held.items()}
        save_file(stored_values, tmp_path / file)
        weight_map |= dict.fromkeys(held, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    done = subprocess.run([sys.executable, "-c", LOADING, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    for (taken, slab, largest, value), width in zip(runs, (2, 4), strict=True):
        assert value == 5.5
        assert slab > width * 100e6
        assert slab * 0.99 < taken < 1.05 * (slab + largest)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the master was allocated")

    monkeypatch.setattr(offloader_module, "Master", refuse)


def whole(folder: Path) -> Path:
    """A model folder of three shards, with a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shard(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def truncate(folder: Path) -> None:
    raw = shard(folder).read_bytes()
    shard(folder).write_bytes(raw[:-100])


def cut_header(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:40])


def longer(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes() + b"\0" * 64)


def edit_index(folder: Path, edit) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def absent_tensor(folder: Path) -> None:
    edit_index(folder, lambda table: table.update({"model.layers.9.weight": shard(folder).name}))


def assigned_elsewhere(folder: Path) -> None:
    def edit(table: dict[str, str]) -> None:
        files = sorted(set(table.values()))
        name = next(name for name, file in table.items() if file == files[1])
        table[name] = files[0]
        tensors = load_file(folder / files[0])
        save_file({**tensors, name: torch.zeros(1)}, folder / files[0])  # a twin where the index says

    edit_index(folder, edit)


def unlisted(folder: Path) -> None:
    save_file({**load_file(shard(folder)), "extra": torch.zeros(1)}, shard(folder))


def escaping(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(shard(folder).read_bytes())
    edit_index(folder, lambda table: table.update({next(iter(table)): "../outside.safetensors"}))


def only_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not even read")


def stored_as(dtype: torch.dtype, name: str = "model.layers.1.mlp.up_proj.weight", stored_name: str | None = None):
    def damage(folder: Path) -> None:
        file = next(f for f in folder.glob("model-*.safetensors") if name in load_file(f))
        tensors = load_file(file)
        tensors[stored_name or name] = tensors.pop(name).to(dtype)
        save_file(tensors, file)
        edit_index(folder, lambda table: table.update({stored_name or name: table.pop(name)}))

    return damage


def config_key(**changes: object):
    return lambda folder: change_json(folder / "config.json", **changes)


def remote_code(folder: Path) -> None:
    """A config and a model of its own, which leave a trace if they are ever imported."""
    code = f"open({str(folder / 'executed')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
    (folder / "own.py").write_text(code + "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n")
    change_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    )


def twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "more.safetensors").write_bytes(shard(folder).read_bytes())


def no_vocabulary(folder: Path) -> None:
    """Transformers makes up an empty one."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def larger_tokenizer(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<word {i}>" for i in range(10)])
    tokenizer.save_pretrained(folder)


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config of something else": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "broken generation settings": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
    "unknown model type": (config_key(model_type="nonsense"), "nonsense"),
    "not a decoder": (config_key(model_type="vit"), "ViTConfig"),
    "no number": (config_key(hidden_size="wide"), "hidden_size"),
    "negative": (config_key(hidden_size=-32), "task.model"),
    "remote code": (remote_code, "code of its own"),
    "missing shard": (lambda f: shard(f).unlink(), "lacks model-00002-of-0000"),
    "truncated shard": (truncate, "not a readable safetensors file, or not all of it"),
    "truncated header": (cut_header, "not a readable safetensors file, or not all of it"),
    "longer shard": (longer, "not a readable safetensors file, or not all of it"),
    "empty shard": (lambda f: shard(f).write_bytes(b""), "not a readable safetensors file, or not all of it"),
    "no safetensors": (lambda f: shard(f).write_bytes(b"junk" * 9), "not a readable safetensors file"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is not a safetensors index"),
    "index of a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not a safetensors index"),
    "index of numbers": (lambda f: edit_index(f, lambda t: t.update({"a": 3})), "is not a safetensors index"),
    "empty index": (lambda f: edit_index(f, dict.clear), "lists no tensor"),
    "absent tensor": (absent_tensor, "holds model.layers.9.weight; it does not"),
    "assigned elsewhere": (assigned_elsewhere, "assigns"),
    "unlisted tensor": (unlisted, "assigns extra to no file"),
    "escaping path": (escaping, "'../outside.safetensors'"),
    "absolute path": (
        lambda f: edit_index(f, lambda t: t.update({next(iter(t)): str(shard(f))})),
        "names a file outside the folder",
    ),
    "shapes": (config_key(intermediate_size=40), "is (48, 32), the config says (40, 32)"),
    "more layers": (config_key(num_hidden_layers=3), "missing: model.layers.2."),
    "fewer layers": (config_key(num_hidden_layers=1), "unexpected: model.layers.1."),
    "only a pickle": (only_pickle, "pytorch_model.bin only, a format that can run code"),
    "fp8": (stored_as(torch.float8_e4m3fn), "model.layers.1.mlp.up_proj.weight is stored as F8_E4M3"),
    "int8": (stored_as(torch.int8), "is stored as I8, which is not supported: quantized weights must be dequantized"),
    "GPTQ": (
        stored_as(torch.int32, stored_name="model.layers.1.mlp.up_proj.qweight"),
        "up_proj.qweight is stored as I32, which is not supported",
    ),
    "said to be quantized": (
        config_key(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized (gptq)",
    ),
    "two files for one name": (twice, "and no model.safetensors.index.json says which counts"),
    "a list for a type": (config_key(model_type=["llama"]), "model_type (['llama']) is not one"),
    "no vocabulary": (no_vocabulary, "its tokenizer knows no text: the vocabulary (tokenizer.json) is missing"),
    "no tokenizer": (no_tokenizer, "has no tokenizer in it"),
    "broken tokenizer": (broken_tokenizer, "its tokenizer does not load"),
    "larger tokenizer": (larger_tokenizer, "vocab_size (256) must be at least the tokenizer's (266)"),
}


@pytest.mark.usefixtures("never_allocated")
@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_model_folder_is_one_line_before_anything_is_allocated(tmp_path, capsys, case):
    damage, expected = FOLDERS[case]
    folder = whole(tmp_path / "model")
    damage(folder)
    capsys.readouterr()
    code = main(["--config", str(config(tmp_path, **{"task.model": str(folder)}))])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and expected in lines[0] and len(lines[0]) < 500, lines[0]
    assert not (folder / "executed").exists()
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("extra", [{}, {"auto_map": {"AutoConfig": "own.OwnConfig"}}], ids=["plain", "auto_map"])
def test_a_good_folder_is_not_refused(tmp_path, extra):
    """With code beside it that transformers does not need, since it knows the type: never run, not passed on."""
    folder = whole(tmp_path / "model")
    change_json(folder / "config.json", **extra)
    (folder / "own.py").write_text("raise SystemExit('executed')")
    assert main(["--config", str(config(tmp_path, **{"task.model": str(folder), "steps": 1}))]) == 0
    exported = tmp_path / "out" / "export"
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [256, 16]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_an_endless_loop(tmp_path):
    folder = whole(tmp_path / "model")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    weights = Weights.match(stored_tensors(folder), model)
    truncate(folder)
    with pytest.raises(UserError) as error:
        materialise(with_memory(model), weights.load)
    assert "has become shorter" in message(error)


@pytest.mark.parametrize("start", ["uniform", "importance"])
def test_weights_that_are_not_numbers_are_named_before_the_first_step(tmp_path, capsys, start):
    folder = whole(tmp_path / "model")
    file = shard(folder, 1)
    tensors = load_file(file)
    name = sorted(name for name in tensors if name.endswith("weight"))[-1]
    tensors[name].view(-1)[3] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    capsys.readouterr()
    code = main(["--config", str(config(tmp_path, **{"task.model": str(folder), "structure.start": start}))])
    line = capsys.readouterr().err.strip()
    assert code == 2 and line == (
        f"error: {name} of the model to begin with holds a NaN or an infinity: nothing can be learned from it"
    )
