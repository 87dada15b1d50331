"""DESIGN §10, 9: the export computes what the final subnet computes, and loads as any model of its kind does."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from errno import ENOSPC
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from offload_trainer import result
from offload_trainer.config import parse
from offload_trainer.errors import UserError
from offload_trainer.files.writing import split, write_shards
from offload_trainer.groups import Groups, Plan, find_groups, random_plan, slice_module
from offload_trainer.master import find_checkpoint
from offload_trainer.result import load_export, save_export, saved_tensors
from offload_trainer.run import main
from offload_trainer.tasks import build_task
from offload_trainer.tasks.hf_config import fitted_config
from offload_trainer.tasks.knobs import NoConfigError
from offload_trainer.tasks.tokens import byte_tokenizer
from tests.runs import LLAMA, TWO_LAYERS, config, custom, growth

COMMON = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (GATED, True),
    "qwen2": (GATED, True),
    "qwen3": ({**GATED, "head_dim": 16}, True),
    "mistral": (GATED, True),
    "phi3": ({**GATED, "pad_token_id": 0}, True),
    "olmo2": (GATED, True),
    "starcoder2": (GATED, True),
    "mixtral": ({**EXPERTS, "intermediate_size": 96, "num_local_experts": 4}, True),
    "qwen3_moe": ({**EXPERTS, "moe_intermediate_size": 32, "num_experts": 4, "intermediate_size": 96}, True),
    "gpt2": ({}, False),
    "gpt_neox": ({"intermediate_size": 96}, False),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, False),
}
"""Model type → its settings, and whether a head has a size of its own: else it is hidden_size / num_attention_heads."""
TOKENS = {"input_ids": torch.arange(33).view(3, 11), "use_cache": False}


@cache
def full_model(kind: str) -> nn.Module:
    """For several tests: none changes it."""
    model_config = AutoConfig.for_model(kind, **{**COMMON, **FAMILIES[kind][0]})
    if "num_experts_per_tok" in FAMILIES[kind][0]:
        model_config._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # nothing that zeros or ones would hide
    return model


@cache
def groups_of(model: nn.Module) -> Groups:
    return find_groups(model, TOKENS)


def sliced(model: nn.Module, ratio: float, residual: float) -> tuple[nn.Module, Plan, Groups]:
    groups = groups_of(model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in groups:
        count = round(group.units * (residual if "residual" in group.name else ratio))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    plan = Plan(groups, kept)
    return slice_module(model, plan, groups).eval(), plan, groups


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**TOKENS).logits


# --- a config for widths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [1.0, 0.5], ids=["residual whole", "residual halved"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_sliced_model_is_saved_as_a_smaller_one_of_its_kind(tmp_path, kind, residual):
    model = full_model(kind)
    small, plan, groups = sliced(model, 0.5, residual)
    result.save_export(small, plan, tmp_path, 20_000)
    if residual == 1.0 and not FAMILIES[kind][1]:
        with pytest.raises(NoConfigError, match="heads be left out in proportion to the residual stream"):
            fitted_config(small, TOKENS)
        return
    fitted_config(small, TOKENS).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    assert sum(p.numel() for p in loaded.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert torch.allclose(logits(loaded), logits(small), atol=1e-5)
    assert torch.allclose(logits(load_export(tmp_path, model, groups)), logits(small), atol=1e-6)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [type(model).__name__] and written["dtype"] == "float32"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"intermediate_size": 40}),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 36}),
        ("mistral", {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        ("phi3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}),  # one axis is 3 + 1 + 1 heads
        ("mixtral", {"num_local_experts": 3}),
        ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 8}),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 24}),
        ("gpt2", {"n_inner": 17}),
        ("gpt2", {"n_embd": 48, "n_head": 3}),
        ("falcon", {"ffn_hidden_size": 33}),
        ("bloom", {"hidden_size": 32, "n_head": 2}),
    ],
)
def test_the_widths_of_a_smaller_config_are_found_again(kind, changes):
    """Whatever groups there are: a module of another config, but which believes in the full one."""
    settings = {**COMMON, **(FAMILIES[kind][0] if kind in FAMILIES else {})}
    if "n_head" in changes or kind == "falcon":
        settings = {k: v for k, v in settings.items() if k not in ("hidden_size", "num_attention_heads")}
        hidden, heads = ("n_embd", "n_head") if kind == "gpt2" else ("hidden_size", "n_head")
        settings |= {hidden: 64, heads if kind != "falcon" else "num_attention_heads": 4}
    full = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **changes})).eval()
    module.config = full
    found = fitted_config(module, TOKENS)
    for key, value in changes.items():
        assert getattr(found, key) == value, found
    assert found.vocab_size == 61 and found.num_hidden_layers == 2


def test_other_models_than_decoders_have_a_config_too(tmp_path):
    kept = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    words, images = {"input_ids": TOKENS["input_ids"]}, (torch.randn(2, 3, 16, 16),)
    for kind, settings, model_class, inputs in (
        (BertConfig, {"vocab_size": 61}, BertForSequenceClassification, words),
        (ViTConfig, {"image_size": 16, "patch_size": 4}, ViTForImageClassification, images),
    ):
        module = model_class(kind(**{**settings, **kept, **small}))
        module.config = kind(**{**settings, **kept})
        module.train()
        found = fitted_config(module, inputs)
        assert {key: getattr(found, key) for key in small} == small
        assert module.training
        found.save_pretrained(tmp_path)
        write_shards(tmp_path, saved_tensors(module), 10**9)
        again = model_class.from_pretrained(tmp_path)
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in module.state_dict().items())


def test_configs_within_configs_and_lists_of_widths():
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32}

    def composite(**changes: int) -> LlavaConfig:
        words = {"model_type": "llama", **COMMON, **GATED, "head_dim": 16, **changes}
        return LlavaConfig(text_config=words, vision_config=vision)

    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    module = LlavaForConditionalGeneration(composite(**small)).eval()
    module.config = composite()
    found = fitted_config(module, {"input_ids": TOKENS["input_ids"]})
    assert {key: getattr(found.text_config, key) for key in small} == small
    assert found.vision_config.intermediate_size == 40

    several = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "vocab_size_per_layer_input": 61, "laurel_rank": 4}
    several |= {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    several |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "model_type": "gemma3n_text"}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**several, intermediate_size=[48, 17])).eval()
    module.config = AutoConfig.for_model(**several, intermediate_size=[96, 96])
    assert fitted_config(module, TOKENS).intermediate_size == [48, 17]


def test_shapes_alone_are_no_proof():
    """The same tensors, cut into heads of another size."""
    settings = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    module = BertForSequenceClassification(BertConfig(**settings, num_attention_heads=2)).eval()
    module.config = BertConfig(**{**settings, "intermediate_size": 99}, num_attention_heads=4)
    with pytest.raises(NoConfigError, match="computes something else"):
        fitted_config(module, {"input_ids": TOKENS["input_ids"]})


def test_there_is_no_config_where_none_is_right():
    def refused(module: nn.Module) -> str:
        with pytest.raises(NoConfigError) as error:
            fitted_config(module, TOKENS)
        return str(error.value)

    llama = full_model("llama")
    groups = groups_of(llama)
    first = next(group for group in groups if "mlp" in group.name)
    uneven = slice_module(llama, Plan(groups, {first.name: torch.arange(7)}), groups)
    assert "layers must not differ" in refused(uneven)
    residual = next(group for group in groups if "residual" in group.name)
    odd = slice_module(llama, Plan(groups, {residual.name: torch.arange(33)}), groups)
    assert "LlamaConfig refuses these widths" in refused(odd) and "not a multiple" in refused(odd)

    settings = {**COMMON, **GATED, "head_dim": 16, "pad_token_id": 0}
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma", **settings)).eval()
    small, _, _ = sliced(gemma, 0.5, residual=0.5)
    assert "computes something else" in refused(small)
    small, _, _ = sliced(gemma, 0.5, residual=1.0)
    assert fitted_config(small, TOKENS).intermediate_size == 48


def test_a_whole_model_keeps_its_config():
    model = full_model("gpt2")
    found = fitted_config(model, TOKENS)
    assert found.n_inner is None and found.to_dict() | {"architectures": None, "dtype": None} == (
        model.config.to_dict() | {"architectures": None, "dtype": None}
    )


def a_model_to_save(folder: str) -> Callable[[], None]:
    """100 M parameters."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 6, "vocab_size": 2048, "num_attention_heads": 16}
    shape["max_position_embeddings"] = 64
    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=4096))
    module = module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.detach().normal_(std=0.02)
    module.model.rotary_emb.inv_freq.copy_(1 / 10000 ** (torch.arange(0, 64, 2) / 64))
    module.config = LlamaConfig(**shape, intermediate_size=5000)
    tokens = {"input_ids": torch.arange(6).view(2, 3), "use_cache": False}
    with torch.no_grad():
        module(**tokens)
    assert sum(parameter.nbytes for parameter in module.parameters()) > 400e6

    def measured() -> None:
        assert fitted_config(module, tokens).intermediate_size == 4096
        write_shards(Path(folder), saved_tensors(module), 2**27)

    return measured


def test_saving_takes_no_second_copy(tmp_path):
    """Neither the proof of the config nor the writing of the tensors."""
    assert growth(a_model_to_save, str(tmp_path)) < 0.1 * 400e6
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.for_model("llama", **COMMON, **GATED))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    (tmp_path / "ours").mkdir()
    tensors = saved_tensors(model)
    write_shards(tmp_path / "ours", tensors, 30_000)
    model.config.save_pretrained(tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / w / "model.safetensors.index.json").read_text()) for w in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert sorted(set(ours["weight_map"].values())) == sorted(p.name for p in (tmp_path / "ours").glob("*.safetensors"))
    for name, file in ours["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "ours" / file)[name], tensors[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert (tmp_path / "ours" / ours["weight_map"]["lm_head.weight"]).stat().st_mode & 0o044


def test_shards_are_filled_as_far_as_they_go():
    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate((6, 6, 2, 6, 2, 2))}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=10).filename_to_tensors.values()
    assert split(tensors, 10) == list(theirs) == [["t0"], ["t1", "t2"], ["t3", "t4", "t5"]]
    assert split(tensors, 24) == [list(tensors)]
    assert split(tensors, 5) == [["t0"], ["t1"], ["t2"], ["t3"], ["t4", "t5"]]  # 6 are more than any shard may have
    assert split({}, 5) == [[]]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_exports_shards_a_tokenizer_and_the_full_master(tmp_path):
    changes = {"export.shard_size": "0.02MB", "export.full": True, "steps": 4}
    file = config(tmp_path, **TWO_LAYERS, **changes)
    assert main(["--config", str(file)]) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    task = build_task(parse(["--config", str(file)]).task, 0)
    master = load_file(find_checkpoint(out).path / "weights.safetensors")
    for name, part in (("export", "exported"), ("full", "full_master")):
        assert len(list((out / name).glob("model-*-of-*.safetensors"))) > 1
        assert not (out / name / "model.safetensors").exists()
        model = AutoModelForCausalLM.from_pretrained(out / name).eval()
        assert sum(p.numel() for p in model.parameters()) == summary[part]["parameters"]
        with torch.no_grad():
            losses = [task.metrics_fn(model, batch)["loss"] for batch in task.val]
        loss = float(torch.stack(losses).mean())
        assert loss == pytest.approx(summary[part]["loss"], rel=1e-5)
        assert summary[part]["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        text = "Grüße, 世界!\n\t  x"
        assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in master.items() if "inv_freq" not in name)
    assert not (out / "full" / "plan.json").exists()
    groups = find_groups(task.model, task.example_inputs)
    whole = AutoModelForCausalLM.from_config(task.model.config)  # real: rotary frequencies are not saved
    small = load_export(out / "export", whole, groups)
    exported = AutoModelForCausalLM.from_pretrained(out / "export")
    assert torch.allclose(logits_of(small), logits_of(exported), atol=1e-6)
    # What was exported is a model like any other: with its tokenizer, it can be trained further.
    again = config(tmp_path, **{"task.model": str(out / "export"), "steps": 2, "out": str(tmp_path / "again")})
    assert main(["--config", str(again)]) == 0
    shutil.move(next((out / "export").glob("model-00002*")), tmp_path / "gone")
    with pytest.raises(UserError, match="is not a whole export"):
        load_export(out / "export", whole, groups)


@pytest.mark.parametrize(
    "plan",
    [
        [1],
        "text",
        {"kept": None},
        {"kept": [1]},
        *({"kept": {"0": kept}} for kept in ([["a"]], "text", None, {}, [2**70])),
    ],
    ids=json.dumps,
)
def test_an_export_with_another_plan_is_one_line(tmp_path, plan):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    groups = find_groups(model, (torch.zeros(2, 8),))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    write_shards(tmp_path, saved_tensors(model), 10**9)
    with pytest.raises(UserError, match=f"{tmp_path} is not a whole export") as error:
        load_export(tmp_path, model, groups)
    assert "\n" not in str(error.value)


def test_a_narrow_master_is_exported_whole_in_its_type_and_sliced_in_float32(tmp_path):
    changes = {"memory.weights": "bf16", "memory.moments": "bf16", "export.full": True, "steps": 4}
    assert main(["--config", str(config(tmp_path, **changes))]) == 0
    out = tmp_path / "out"
    models = {name: AutoModelForCausalLM.from_pretrained(out / name) for name in ("export", "full")}
    assert [model.dtype for model in models.values()] == [torch.float32, torch.bfloat16]
    stored = load_file(out / "full" / "model.safetensors")
    matrices = {name: tensor for name, tensor in models["full"].state_dict().items() if tensor.ndim > 1}
    assert all(torch.equal(stored[name], tensor) for name, tensor in matrices.items() if name in stored)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def test_the_full_master_of_any_model_is_saved(tmp_path):
    file = config(tmp_path, **custom("blobs"), **{"export.full": True, "steps": 4})
    assert main(["--config", str(file)]) == 0
    master = load_file(find_checkpoint(tmp_path / "out").path / "weights.safetensors")
    saved = load_file(tmp_path / "out" / "full" / "model.safetensors")
    assert saved.keys() == master.keys() and all(torch.equal(saved[name], master[name]) for name in master)


def failing(at: str):
    """Makes an export fail: too little room on the disk, or an error while a file is written."""

    def room(monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        true = shutil.disk_usage
        monkeypatch.setattr(
            result.shutil, "disk_usage", lambda p: usage(9, 8, 1) if "writing-export" in str(p) else true(p)
        )

    def write(monkeypatch: pytest.MonkeyPatch) -> None:
        def breaks(folder: Path, *_: object) -> None:
            (folder / "model-00001-of-00002.safetensors").write_bytes(b"half of it")
            raise OSError(ENOSPC, "No space left on device")

        monkeypatch.setattr(result, "write_shards", breaks)

    return {"room": room, "write": write}[at]


@pytest.mark.parametrize("at", ["room", "write"])
def test_an_export_that_cannot_be_written_leaves_everything_as_it_was(tmp_path, monkeypatch, capsys, at):
    file = config(tmp_path, steps=4)
    assert main(["--config", str(file)]) == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in (out / "export").iterdir()}
    with monkeypatch.context() as patch:
        failing(at)(patch)
        assert main(["--config", str(file), "--steps", "8", "--resume", "auto"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: cannot write {out / 'export'}: "), lines
    assert ("No space left" if at == "write" else "are free; make room") in lines[0]
    assert {path.name: path.read_bytes() for path in (out / "export").iterdir()} == before
    assert not list(out.glob(".writing*"))
    assert find_checkpoint(out).meta["step"] == 8
    assert main(["--config", str(file), "--steps", "8", "--resume", "auto"]) == 0  # nothing to do but export
    assert {path.name: path.read_bytes() for path in (out / "export").iterdir()} != before


def test_the_byte_tokenizer_is_bytes():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 256
    every = "".join(chr(i) for i in [*range(0x3000), *range(0x1F600, 0x1F640)])
    assert tokenizer(every)["input_ids"] == list(every.encode())
    assert LLAMA["vocab_size"] == 256


class Scaled(nn.Module):
    """With a buffer that is sliced and not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) * self.scale).relu())


def test_a_buffer_that_is_not_saved_is_sliced_from_the_models(tmp_path: Path) -> None:
    model, x = Scaled(), torch.randn(3, 6)
    groups = find_groups(model, (x,))
    plan = random_plan(groups, torch.Generator().manual_seed(0), 0.5)
    small = slice_module(model, plan, groups).eval()
    save_export(small, plan, tmp_path, 10**9)
    assert torch.equal(load_export(tmp_path, Scaled(), groups)(x), small(x))


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
def test_heads_of_several_sizes_are_no_single_number(tmp_path: Path) -> None:
    """Gemma 4's config refuses to say what the size of a head is."""
    torch.manual_seed(0)
    settings = COMMON | GATED | {"head_dim": 16, "global_head_dim": 32, "pad_token_id": 0}
    settings |= {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "num_global_key_value_heads": 2,
    }
    settings |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **settings)).eval()
    groups = find_groups(model, TOKENS)
    kept = {group.name: torch.arange(group.units // 2) for group in groups if "mlp" in group.name}
    small = slice_module(model, Plan(groups, kept), groups).eval()
    assert fitted_config(small, TOKENS).intermediate_size == 48
