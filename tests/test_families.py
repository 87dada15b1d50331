"""The model families of the README, at tiny size: traced as one expects, proved, and trained for a few rounds."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_trainer import Groups, Offloader, Plan, Structure, find_groups, verify_groups
from tests.models import UNet, classifier, efficientnet_lite, images, llm, moe, tokens


class Seen(NamedTuple):
    """What one expects of a group."""

    units: int
    slots: str
    below: str | None = None
    """The module that the slots' names are relative to; None: the one the group is named after."""


class Family(NamedTuple):
    build: Callable[[str], nn.Module]
    """device → model."""
    inputs: Any
    groups: int
    expected: dict[str, Seen]


TEXT, BATCH = tokens(), {"pixel_values": images(size=32)[0]}
HEADS = "q_proj.weight:0:32 k_proj.weight:0:16 v_proj.weight:0:16 o_proj.weight:1:32"
GATED = "gate_proj.weight:0 up_proj.weight:0 down_proj.weight:1"
EXPERTS = "gate.weight:0 experts.gate_up_proj:0 experts.down_proj:0"
HIDDEN = "gate_up_proj:1 gate_up_proj:1:1:{0} down_proj:2"
VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
BLOCK = (
    "{0}.layer_scale_parameter:0 {0}.dwconv.weight:0 {0}.dwconv.bias:0 {0}.layernorm.weight:0 {0}.layernorm.bias:0 "
    "{0}.pwconv1.weight:1 {0}.pwconv2.weight:0 {0}.pwconv2.bias:0"
)
NORM = "{0}.weight:0 {0}.bias:0 {0}.running_mean:0 {0}.running_var:0"


def each(text: str, *names: str) -> str:
    return " ".join(text.format(name) for name in names)


def decoder(kind: str, **settings: Any) -> Family:
    layer = "model.layers.1"
    expected = {f"{layer}.self_attn": Seen(2, HEADS), f"{layer}.mlp": Seen(96, GATED)}
    return Family(lambda device: llm(kind, device=device, **settings), TEXT, 5, expected)


def mixture(kind: str, features: int, **settings: Any) -> Family:
    layer = "model.layers.1"
    expected = {
        f"{layer}.self_attn": Seen(2, HEADS),
        f"{layer}.mlp.gate": Seen(4, EXPERTS, f"{layer}.mlp"),
        f"{layer}.mlp.experts": Seen(features, HIDDEN.format(features)),
    }
    return Family(lambda device: moe(kind, device=device, **settings), TEXT, 7, expected)


FAMILIES = {
    "Llama": decoder("llama"),
    "Qwen3": decoder("qwen3", head_dim=16),
    "Mistral": decoder("mistral"),
    "Gemma": decoder("gemma", head_dim=16),
    "Phi-3": Family(
        lambda device: llm("phi3", device=device, pad_token_id=0),
        TEXT,
        5,
        {
            "model.layers.1.self_attn.qkv_proj": Seen(
                2,
                "qkv_proj.weight:0:32 qkv_proj.weight:0:16:64 qkv_proj.weight:0:16:96 o_proj.weight:1:32",
                "model.layers.1.self_attn",
            ),
            "model.layers.1.mlp.gate_up_proj": Seen(
                96,
                "gate_up_proj.weight:0 gate_up_proj.weight:0:1:96 down_proj.weight:1",
                "model.layers.1.mlp",
            ),
        },
    ),
    "GPT-2": Family(
        lambda device: llm("gpt2", device=device, bos_token_id=1, eos_token_id=2),
        TEXT,
        5,
        {
            "transformer.h.1.attn.c_proj": Seen(
                4,
                "c_attn.weight:1:16 c_attn.weight:1:16:64 c_attn.weight:1:16:128 c_proj.weight:0:16 "
                "c_attn.bias:0:16 c_attn.bias:0:16:64 c_attn.bias:0:16:128",
                "transformer.h.1.attn",
            ),
            "transformer.h.1.mlp.c_proj": Seen(256, "c_fc.weight:1 c_fc.bias:0 c_proj.weight:0", "transformer.h.1.mlp"),
        },
    ),
    "GPT-NeoX": Family(
        lambda device: llm("gpt_neox", device=device),
        TEXT,
        5,
        {
            "gpt_neox.layers.1.attention.query_key_value": Seen(
                4,
                "query_key_value.weight:0:48 query_key_value.bias:0:48 dense.weight:1:16",
                "gpt_neox.layers.1.attention",
            ),
            "gpt_neox.layers.1.mlp.dense_h_to_4h": Seen(
                96, "dense_h_to_4h.weight:0 dense_h_to_4h.bias:0 dense_4h_to_h.weight:1", "gpt_neox.layers.1.mlp"
            ),
        },
    ),
    "OPT": Family(
        lambda device: llm("opt", device=device, ffn_dim=96, word_embed_proj_dim=64),
        TEXT,
        5,
        {
            "model.decoder.layers.1.self_attn": Seen(
                4, each("{0}.weight:0:16 {0}.bias:0:16", "q_proj", "k_proj", "v_proj") + " out_proj.weight:1:16"
            ),
            "model.decoder.layers.1.fc1": Seen(96, "fc1.weight:0 fc1.bias:0 fc2.weight:1", "model.decoder.layers.1"),
        },
    ),
    "Mixtral": mixture("mixtral", 96),
    "Qwen3-MoE": mixture("qwen3_moe", 24, head_dim=16),
    "BERT": Family(
        lambda device: llm("bert", device=device),
        {"input_ids": TEXT["input_ids"]},
        5,
        {
            "bert.encoder.layer.1.attention.self": Seen(
                4,
                each("self.{0}.weight:0:16 self.{0}.bias:0:16", "query", "key", "value") + " output.dense.weight:1:16",
                "bert.encoder.layer.1.attention",
            ),
            "bert.encoder.layer.1.intermediate.dense": Seen(
                96,
                "intermediate.dense.weight:0 intermediate.dense.bias:0 output.dense.weight:1",
                "bert.encoder.layer.1",
            ),
        },
    ),
    "ViT": Family(
        lambda device: classifier("vit", device=device, **VIT),
        BATCH,
        5,
        {
            "vit.layers.1.attention": Seen(
                4, each("{0}.weight:0:8 {0}.bias:0:8", "q_proj", "k_proj", "v_proj") + " o_proj.weight:1:8"
            ),
            "vit.layers.1.mlp.fc1": Seen(48, "fc1.weight:0 fc1.bias:0 fc2.weight:1", "vit.layers.1.mlp"),
        },
    ),
    "ResNet": Family(
        lambda device: classifier("resnet", device=device, embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2]),
        BATCH,
        11,
        {
            "resnet.encoder.stages.1.layers.1.layer.0.convolution": Seen(
                6,
                "0.convolution.weight:0 1.convolution.weight:1 " + NORM.format("0.normalization"),
                "resnet.encoder.stages.1.layers.1.layer",
            ),
        },
    ),
    "ConvNeXt": Family(
        lambda device: classifier("convnext", device=device, hidden_sizes=[8, 12], depths=[1, 2], num_stages=2),
        BATCH,
        5,
        {
            "residual.convnext.encoder.stages.1.downsampling_layer.1": Seen(
                12,
                "classifier.weight:1 convnext.layernorm.weight:0 convnext.layernorm.bias:0 "
                + each("convnext.encoder.stages.1.downsampling_layer.1.{0}:0", "weight", "bias")
                + " "
                + each(BLOCK, *(f"convnext.encoder.stages.1.layers.{i}" for i in (0, 1))),
                "",
            ),
        },
    ),
    "MobileNetV2": Family(
        lambda device: classifier("mobilenet_v2", device=device, depth_multiplier=0.25, image_size=32),
        BATCH,
        25,
        {
            "mobilenet_v2.layer.5": Seen(
                48,
                "expand_1x1.convolution.weight:0 conv_3x3.convolution.weight:0 reduce_1x1.convolution.weight:1 "
                + each(NORM, "expand_1x1.normalization", "conv_3x3.normalization"),
            ),
        },
    ),
    "EfficientNet-Lite": Family(
        efficientnet_lite,
        images(size=32),
        16,
        {
            "_blocks.2": Seen(
                48,
                "_expand_conv.weight:0 _depthwise_conv.weight:0 _project_conv.weight:1 " + each(NORM, "_bn0", "_bn1"),
            ),
        },
    ),
    "U-Net": Family(
        lambda device: UNet().to(device),
        images(),
        7,
        {
            "down1.0": Seen(8, "down1.0.weight:0 down2.0.weight:1 join1.0.weight:1:1:8 " + NORM.format("down1.1"), ""),
            "down2.0": Seen(
                12, "down2.0.weight:0 middle.0.weight:1 join2.0.weight:1:1:12 " + NORM.format("down2.1"), ""
            ),
        },
    ),
}


def logits_of(module: nn.Module, inputs: Any) -> Tensor:
    out = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    logits = out if isinstance(out, Tensor) else out.logits
    return logits.movedim(1, -1) if logits.ndim == 4 else logits  # (…, classes)


def loss_fn(module: nn.Module, inputs: Any) -> Tensor:
    logits = logits_of(module, inputs).flatten(0, -2)
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


def inside(plan: Plan, name: str, shape: torch.Size) -> Tensor:
    """True where the plan keeps an entry of the tensor."""
    mask = torch.ones(shape, dtype=torch.bool)
    for axis, kept in enumerate(plan.indices(name)):
        if kept is not None:
            line = torch.zeros(shape[axis], dtype=torch.bool)
            line[kept] = True
            mask &= line.view([-1 if i == axis else 1 for i in range(len(shape))])
    return mask


def train(model: nn.Module, groups: Groups, inputs: Any, rounds: int = 3, steps: int = 2) -> None:
    """Rounds of a real run: DESIGN's invariants 2 and 9."""
    structure = Structure(groups, keep=0.5, sampler="fixed", seed=0)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)  # noqa: E731
    with Offloader(model, groups, loss_fn, optimizer=adam, structure=structure, sync_every=steps) as offloader:
        for _ in range(rounds):
            offloader.begin_round()
            plan, subnet = offloader.plan, offloader.subnet
            before = {name: tensor.clone() for name, tensor in offloader.master.items()}
            for _ in range(steps):
                loss = offloader.loss(inputs)
                assert bool(loss.isfinite())
                loss.backward()
                offloader.step()
            moved = 0
            for name, tensor in offloader.master.items():
                changed = bits(tensor) != bits(before[name])
                assert not (changed & ~inside(plan, name, tensor.shape)).any(), f"{name}: changed outside of the plan"
                moved += int(changed.sum())
            assert moved > 0
        exported = offloader.export(plan).eval()
        with torch.no_grad():
            assert torch.equal(logits_of(exported, inputs), logits_of(subnet.eval(), inputs))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_traced_proved_and_trained(name: str):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build("cpu")
    groups = find_groups(model, family.inputs)
    assert len(groups) == family.groups
    for group, seen in family.expected.items():
        below = group if seen.below is None else seen.below
        assert groups[group].units == seen.units
        assert {str(slot) for slot in groups.slots(group)} == {
            f"{below}.{slot}".lstrip(".") for slot in seen.slots.split()
        }
    assert verify_groups(model, groups, family.inputs) < 2e-5
    train(model, groups, family.inputs)


TP_PLANS = ["Llama", "Qwen3", "Mistral", "Gemma", "Phi-3", "GPT-NeoX", "Mixtral", "Qwen3-MoE"]


def test_every_family_with_a_tensor_parallel_plan_is_compared_with_it():
    having = [name for name, family in FAMILIES.items() if tp_plan(family.build("meta"))]
    assert having == TP_PLANS


def tp_plan(model: nn.Module) -> dict[str, str]:
    return getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {}


@pytest.mark.parametrize("name", TP_PLANS)
def test_the_tensor_parallel_plan_of_transformers_agrees(name: str):
    """Colwise weights are cut along their outputs, rowwise ones along their inputs, by heads or features."""
    model = FAMILIES[name].build("meta")
    groups = find_groups(model, TEXT)
    inner = {(s.tensor, s.axis) for group in groups if group.name != "residual" for s in group.slots}
    checked = set()
    for pattern, style in tp_plan(model).items():
        for tensor, shape in groups.shapes.items():
            matches = fnmatch(tensor, f"{model.base_model_prefix}.{pattern}.weight") or fnmatch(
                tensor, f"{model.base_model_prefix}.{pattern}"
            )
            if matches and len(shape) > 1 and ("colwise" in style or "rowwise" in style):
                axis = len(shape) - (2 if "colwise" in style else 1)  # in front of it are experts
                assert (tensor, axis) in inner, (tensor, style)
                checked.add(tensor)
    within = {tensor for tensor, shape in groups.shapes.items() if len(shape) > 1 and ".layers." in tensor}
    assert checked == {tensor for tensor in within if not tensor.endswith("mlp.gate.weight")}
