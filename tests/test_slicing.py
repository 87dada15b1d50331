"""Sliced modules: what they hold, what they leave alone, and that they compute what the gated model does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from offload_trainer import UserError, find_groups, slice_module, verify_groups
from offload_trainer.groups import Groups, Plan, random_plan
from offload_trainer.groups.slicing import named_tensors, with_tensors
from tests import models
from tests.models import Attention, ViT, images, llm, tokens, vectors


def materialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """On the CPU, every floating-point tensor random and none zero; ties stay tied, rotary frequencies right."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, old in named_tensors(model).items():
        values = torch.rand(old.shape, generator=generator) * 0.5 + 0.1
        sign = torch.randint(2, old.shape, generator=generator) * 2 - 1 if old.ndim > 1 else 1
        tensors[name] = (values * sign).to(old.dtype)
        if name.endswith("inv_freq"):
            tensors[name] = 10000.0 ** -(torch.arange(len(old)) / len(old))
    return with_tensors(model, tensors).train()


def made(family: str, seed: int = 0) -> tuple[nn.Module, Groups, Plan, Any]:
    model, inputs = models.FAMILIES[family]()
    groups = find_groups(model, inputs)
    plan = random_plan(groups, torch.Generator().manual_seed(seed), spread=0.3)
    return materialised(model, seed), groups, plan, inputs


@pytest.mark.parametrize("family", ["unet", "norms", "shared twice", "tied embedding", "llama, tied", "gpt2"])
def test_every_tensor_is_the_kept_part_of_its_own_and_has_its_own_memory(family: str):
    model, groups, plan, _ = made(family)
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    config = copy.deepcopy(vars(model).get("config"))
    small = slice_module(model, plan, groups)
    parts, full = named_tensors(small), named_tensors(model)
    assert list(parts) == list(full) and isinstance(small, type(model)) and small.training
    taken = {tensor.untyped_storage().data_ptr() for tensor in full.values()}
    for name, part in parts.items():
        index = [slice(None)] * part.ndim
        expected = full[name]
        for axis, kept in enumerate(plan.indices(name)):
            if kept is not None:
                expected = expected[(*index[:axis], kept)]
        assert torch.equal(part, expected) and part.dtype == full[name].dtype, name
        assert part.shape == plan.shape(name) and part.is_contiguous()
        assert part.requires_grad == full[name].requires_grad
        # Its own memory, of its own size: no view that would keep something full-size alive.
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        assert part.untyped_storage().data_ptr() not in taken
    assert all(torch.equal(full[name], tensor) for name, tensor in before.items())  # NaN-free by construction
    if config is not None:
        assert model.config.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["tied embedding", "llama, tied"])
def test_ties_survive(family: str):
    model, groups, plan, _ = made(family)
    small = slice_module(model, plan, groups)
    names = [name for name, _ in small.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(small.parameters())) + 1
    get = dict(small.named_parameters(remove_duplicate=False)).__getitem__
    head = next(name for name in names if name.endswith("head.weight"))
    embedding = next(name for name in names if "embed" in name)
    assert get(head) is get(embedding)


def test_a_whole_plan_is_a_copy():
    model, groups, _, inputs = made("llama")
    small = slice_module(model, Plan.whole(groups), groups)
    assert torch.equal(small(**inputs).logits, model(**inputs).logits)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_frozen_parameters_stay(dtype: torch.dtype):
    model = models.MLP().to(dtype)
    model.first.bias.requires_grad_(False)
    groups = find_groups(model, (torch.zeros(3, 6, dtype=dtype),))
    small = slice_module(model, Plan(groups, {"first": [1, 2, 5]}), groups)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [p.requires_grad for p in small.parameters()] == [True, False, True, True]


def widths(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name) for name in names]


def test_attributes_follow_their_tensors():
    channels = ("in_channels", "out_channels", "groups")
    model, inputs = models.FAMILIES["grouped convolutions"]()
    groups = find_groups(model, inputs)
    small = slice_module(model, Plan(groups, {groups.groups[0].name: [0, 2, 3]}), groups)
    assert widths(small.grouped, *channels) == [12, 18, 3]
    assert widths(small.transposed, *channels) == [18, 12, 3]
    assert widths(small.multiplier, *channels) == [12, 24, 12]
    assert widths(model.grouped, *channels) == [16, 24, 4], "the original is untouched"
    assert small.head.in_features == 24

    model, inputs = models.FAMILIES["norms"]()
    groups = find_groups(model, inputs)
    names = ["convs.0", "convs.1", "convs.2", "convs.3", "inner"]
    small = slice_module(
        model, Plan(groups, dict(zip(names, [[1, 3], [0, 4, 5], [2], range(7), [0, 9]], strict=True))), groups
    )
    assert widths(small.norms[0], "num_groups", "num_channels") == [2, 8]
    assert widths(small.norms[1], "num_groups", "num_channels") == [1, 3]
    assert small.norms[2].num_features == 1 and small.act.num_parameters == 7
    assert small.layer.normalized_shape == (7,) and small.rms.normalized_shape == (2,)
    assert widths(small.convs[0], *channels) == [3, 8, 1] and widths(small.inner, "in_features", "out_features") == [
        7,
        2,
    ]

    model, inputs = models.FAMILIES["inverted residual"]()
    groups = find_groups(model, inputs)
    small = slice_module(model, Plan(groups, {"expand.0": range(5)}), groups)
    assert widths(small.depthwise[0], *channels) == [5, 5, 5] and small.depthwise[1].num_features == 5

    model = models.TiedEmbedding()
    groups = find_groups(model, (tokens()["input_ids"],))
    small = slice_module(model, Plan(groups, {"inner": [3, 4]}), groups)
    assert widths(small.embed, "num_embeddings", "embedding_dim") == [61, 2]


def test_attributes_of_transformers_follow_and_its_shared_config_does_not():
    model = materialised(llm("phi3", pad_token_id=0))
    groups = find_groups(model, tokens())
    kept = {"model.layers.0.self_attn.qkv_proj": [1]}
    small = slice_module(model, Plan(groups, kept), groups)
    counts = [layer.self_attn.config.num_attention_heads for layer in small.model.layers]
    assert counts == [2, 4] and small.config.num_attention_heads == model.config.num_attention_heads == 4
    small(**tokens())
    model = llm("gpt2")
    groups = find_groups(model, tokens())
    small = slice_module(model, Plan(groups, {"transformer.h.1.attn.c_proj": [0, 2, 3]}), groups)
    assert widths(small.transformer.h[1].attn, "num_heads", "split_size") == [3, 48]
    assert widths(small.transformer.h[0].attn, "num_heads", "split_size") == [4, 64]


def test_a_width_of_ones_own_type_needs_a_rule():
    model = ViT(free=False)
    with pytest.raises(UserError, match=r"no rule covers \(attention stores heads=4, .*add a rule \(widths=…\)"):
        find_groups(model, images())
    groups = find_groups(model, images(), widths={Attention: {"heads": ("qkv.weight", 0)}})
    small = slice_module(model, Plan(groups, {"attention.qkv": [0, 3]}), groups)
    assert small.attention.heads == 2 and model.attention.heads == 4


@pytest.mark.parametrize("rule", [{"headz": ("qkv.weight", 0)}, {"heads": ("qkv.wait", 0)}])
def test_a_rule_with_a_typing_error_is_a_line(rule: dict):
    with pytest.raises(UserError, match=r"widths: Attention has no '(headz|qkv.wait)'"):
        find_groups(ViT(free=False), images(), widths={Attention: rule})


def test_a_rule_of_a_subclass_adds_to_its_base():
    class Projection(nn.Linear):
        def __init__(self, *sizes: int):
            super().__init__(*sizes)
            self.width = self.out_features

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).view(len(input), self.width)

    model = nn.Sequential(Projection(6, 8), nn.ReLU(), nn.Linear(8, 5))
    groups = find_groups(model, vectors(6), widths={Projection: {"width": ("weight", 0)}})
    small = slice_module(model, Plan(groups, {"0": [1, 2, 4]}), groups)
    assert widths(small[0], "width", "out_features", "in_features") == [3, 3, 6]


def test_a_width_that_would_be_a_fraction_is_a_line():
    model = ViT(free=False)
    model.attention.heads = 2  # two attention heads for four units
    groups = find_groups(ViT(), images(), widths={Attention: {"heads": ("qkv.weight", 0)}})
    with pytest.raises(UserError, match=r"attention.heads \(2\) does not scale to a whole number"):
        slice_module(model, Plan(groups, {"attention.qkv": [0, 1, 2]}), groups)


def test_a_module_that_cannot_be_copied_is_a_line():
    model = models.MLP()
    model.stream = open(__file__)  # noqa: SIM115
    with pytest.raises(UserError, match="MLP cannot be copied, as slicing it needs"):
        find_groups(model, vectors(6))
    model.stream.close()


def test_the_old_weight_norm_is_a_line_that_says_what_to_use() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    with pytest.raises(UserError, match=r"cannot be copied.*torch.nn.utils.parametrizations"):
        find_groups(model, vectors(6))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameter_is_refused(register: str) -> None:
    """A slice would not have it, and train differently without a word."""
    model = models.MLP()
    groups = find_groups(model, vectors(6))
    handle = getattr(model.first.weight, register)(lambda _: None)
    for use in (lambda: find_groups(model, vectors(6)), lambda: slice_module(model, random_plan_of(groups), groups)):
        with pytest.raises(UserError, match=r"first.weight has a hook \(register_hook"):
            use()
    handle.remove()
    slice_module(model, random_plan_of(groups), groups)


def random_plan_of(groups: Groups) -> Plan:
    return random_plan(groups, torch.Generator().manual_seed(0))


def test_widths_follow_weights_that_are_computed() -> None:
    """Of a grouped convolution, too, whose number of groups is a width."""
    norm = torch.nn.utils.parametrizations.weight_norm
    convs = [nn.Conv1d(4, 12, 3), nn.ReLU(), norm(nn.Conv1d(12, 12, 3, groups=4)), nn.ReLU(), nn.Conv1d(12, 3, 1)]
    model, inputs = nn.Sequential(*convs), (torch.randn(3, 4, 11),)
    groups = find_groups(model, inputs)
    assert [group.units for group in groups] == [4]
    assert verify_groups(model, groups, inputs) < 1e-5
    sliced = slice_module(model, Plan(groups, {groups.groups[0].name: [1, 3]}), groups)
    assert (sliced[2].groups, sliced[2].in_channels, sliced[2].out_channels) == (2, 6, 6)
    for other in (norm, torch.nn.utils.parametrizations.spectral_norm):
        linear = nn.Sequential(other(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))
        groups = find_groups(linear, vectors(6))
        half = slice_module(linear, Plan(groups, {groups.groups[0].name: [0, 2, 3, 5]}), groups)
        assert half[0].out_features == 4 and half[0].weight.shape == (4, 6)


# Invariant 3: forward and gradients. Where no norm reduces over sliced units, gating is multiplying with a mask.

MASKABLE = ["mlp", "unet", "dense block", "inverted residual", "conv flatten linear", "shared twice", "unused"]


def masks(plan: Plan, groups: Groups) -> dict[str, Tensor]:
    """1 where the plan keeps an element, 0 elsewhere."""
    made = {}
    for name, shape in groups.shapes.items():
        mask = torch.ones(shape)
        for axis, kept in enumerate(plan.indices(name)):
            if kept is not None:
                line = torch.zeros(shape[axis])
                line[kept] = 1
                mask *= line.view([-1 if i == axis else 1 for i in range(len(shape))])
        made[name] = mask
    return made


def kept_part(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    for axis, kept in enumerate(plan.indices(name)):
        if kept is not None:
            tensor = tensor.index_select(axis, kept)
    return tensor


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", [*MASKABLE, "resnet32"])
def test_sliced_equals_masked_forward_and_gradients(family: str, seed: int):
    model, groups, plan, inputs = made(family, seed)
    model.eval()  # batch statistics of BatchNorm would be the same too, but its in-place updates stand in the way
    small = slice_module(model, plan, groups)
    full = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    for name, _ in model.named_parameters():
        full[name].requires_grad_()
    gates = masks(plan, groups)
    gated = {name: tensor * gates[name].to(tensor.dtype) for name, tensor in full.items()}
    expected, mine = torch.func.functional_call(model, gated, inputs), small(*inputs)
    scale = expected.abs().max().item()
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * scale)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (expected * weights).sum().backward()
    (mine * weights).sum().backward()
    for name, parameter in small.named_parameters():
        theirs = full[name].grad
        if parameter.grad is None:
            assert family == "unused" and (theirs is None or not theirs.any())
            continue
        assert theirs is not None
        outside = theirs * (1 - gates[name])
        assert not outside.any(), f"{name}: a dropped entry has a gradient"
        atol = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(parameter.grad, kept_part(theirs, plan, name), rtol=1e-3, atol=atol)


def smaller_llama(groups: Groups, plan: Plan, settings: dict[str, Any]) -> nn.Module:
    return materialised(
        llm(
            "llama",
            hidden_size=len(plan["residual"]),
            intermediate_size=len(plan["model.layers.0.mlp"]),
            num_attention_heads=2 * len(plan["model.layers.0.self_attn"]),
            num_key_value_heads=len(plan["model.layers.0.self_attn"]),
            head_dim=8,
            **settings,
        )
    )


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_a_sliced_llama_is_the_smaller_llama_bit_for_bit(settings: dict[str, Any]):
    """Logits and gradients, with the residual stream sliced, against transformers' own model of those widths."""
    model = llm("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, **settings)
    groups = find_groups(model, tokens())
    model = materialised(model)
    units = {group.name: group.units for group in groups}
    counts = {name: {64: 48, 96: 56, 4: 3}[n] for name, n in units.items()}
    generator = torch.Generator().manual_seed(3)
    kept = {name: torch.randperm(n, generator=generator)[: counts[name]].sort().values for name, n in units.items()}
    plan = Plan(groups, kept)
    small, own = slice_module(model, plan, groups), smaller_llama(groups, plan, settings)
    assert isinstance(own, type(small)) and isinstance(own, AutoModelForCausalLM._model_mapping[type(own.config)])
    own.load_state_dict(small.state_dict())
    mine, theirs = (m(**tokens(), labels=tokens()["input_ids"]) for m in (small, own))
    assert torch.equal(mine.logits, theirs.logits) and bool(mine.logits.isfinite().all())
    mine.loss.backward()
    theirs.loss.backward()
    gradients = dict(own.named_parameters())
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, gradients[name].grad), name


def test_the_auxiliary_head_runs_in_training():
    model, groups, plan, inputs = made("auxiliary head")
    small = slice_module(model, plan, groups)
    assert len(small.train()(*inputs)) == 2 and small.auxiliary.in_features == len(plan["stem"])
