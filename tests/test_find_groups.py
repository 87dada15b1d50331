"""What can be sliced: every family is traced and proved; exact groups of the important ones; errors that help."""

import functools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_trainer import Groups, UserError, find_groups, verify_groups
from offload_trainer.groups import read_rules, rule
from offload_trainer.groups.rules import RULES, pointwise
from tests import models
from tests.models import FAMILIES, MLP, ViT, images, llm, moe, tokens, vectors
from tests.runs import growth


def slots(groups: Groups, name: str) -> set[str]:
    return {str(slot) for slot in groups.slots(name)}


def units(groups: Groups) -> dict[str, int]:
    return {group.name: group.units for group in groups}


IN_FAMILIES = {"llama", "qwen3", "mistral", "gemma", "phi3", "gpt2", "gpt_neox", "opt"}
"""The same models are proved, and trained, in test_families.py."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in IN_FAMILIES])
def test_every_family_is_found_and_proved(family: str):
    model, inputs = FAMILIES[family]()
    groups = find_groups(model, inputs)
    assert verify_groups(model, groups, inputs) < 2e-5
    assert all(group.units > 1 for group in groups) and str(groups)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool):
    """Grouped-query attention: one unit is a key/value head with its two query heads."""
    groups = find_groups(llm("llama", tie_word_embeddings=tied), tokens())
    layer = "model.layers.1"
    assert slots(groups, f"{layer}.self_attn") == {
        f"{layer}.self_attn.q_proj.weight:0:32",
        f"{layer}.self_attn.k_proj.weight:0:16",
        f"{layer}.self_attn.v_proj.weight:0:16",
        f"{layer}.self_attn.o_proj.weight:1:32",
    }
    assert slots(groups, f"{layer}.mlp") == {
        f"{layer}.mlp.gate_proj.weight:0",
        f"{layer}.mlp.up_proj.weight:0",
        f"{layer}.mlp.down_proj.weight:1",
    }
    assert units(groups) == {
        "residual": 64,
        **{f"model.layers.{i}.{part}": count for i in (0, 1) for part, count in (("self_attn", 2), ("mlp", 96))},
    }
    expected = {"model.embed_tokens.weight:1", "model.norm.weight:0"} | ({"lm_head.weight:1"} if not tied else set())
    for i in (0, 1):
        expected |= {f"model.layers.{i}.{norm}_layernorm.weight:0" for norm in ("input", "post_attention")}
        expected |= {f"model.layers.{i}.self_attn.{p}_proj.weight:1" for p in "qkv"}
        expected |= {f"model.layers.{i}.mlp.{p}_proj.weight:1" for p in ("gate", "up")}
        expected |= {f"model.layers.{i}.self_attn.o_proj.weight:0", f"model.layers.{i}.mlp.down_proj.weight:0"}
    assert slots(groups, "residual") == expected


def test_the_block_of_a_group_divides_those_of_its_matrices():
    """Widths in elements are multiples of it: what a structure needs to round them."""
    groups = find_groups(llm("llama"), tokens())
    assert groups.block("model.layers.0.self_attn") == 16  # queries have 32 rows a unit, keys 16
    assert groups.block("residual") == groups.block("model.layers.0.mlp") == 1
    assert find_groups(llm("gpt_neox"), tokens()).block("gpt_neox.layers.0.attention.query_key_value") == 16
    sinks = find_groups(moe("gpt_oss", head_dim=16), tokens())  # two a unit, in a vector: no width of a matrix
    assert sinks.block("model.layers.0.self_attn") == 16
    by_hand = read_rules({"bias": ["second.bias:0"]}, MLP())
    assert by_hand.block("bias") == 1, "no matrix at all"


def test_multi_query_attention():
    """One key/value head for all: the units are query heads, and the module's count of them follows."""
    model = llm("llama", num_key_value_heads=1)
    groups = find_groups(model, tokens())
    layer = "model.layers.0.self_attn"
    assert slots(groups, f"{layer}.q_proj") == {f"{layer}.q_proj.weight:0:16", f"{layer}.o_proj.weight:1:16"}
    assert groups[f"{layer}.q_proj"].units == 4
    verify_groups(model, groups, tokens())


def test_interleaved_and_consecutive_fused_projections():
    groups = find_groups(llm("gpt_neox"), tokens())
    name = "gpt_neox.layers.0.attention"
    assert slots(groups, f"{name}.query_key_value") == {
        f"{name}.query_key_value.weight:0:48",
        f"{name}.query_key_value.bias:0:48",
        f"{name}.dense.weight:1:16",
    }
    groups = find_groups(llm("gpt2"), tokens())
    name = "transformer.h.0.attn"
    assert {str(s) for s in groups.slots(f"{name}.c_proj") if "c_attn.weight" in s.tensor} == {
        f"{name}.c_attn.weight:1:16",
        f"{name}.c_attn.weight:1:16:64",
        f"{name}.c_attn.weight:1:16:128",
    }
    groups = find_groups(llm("phi3", pad_token_id=0), tokens())
    name = "model.layers.0"
    assert slots(groups, f"{name}.mlp.gate_up_proj") == {
        f"{name}.mlp.gate_up_proj.weight:0",
        f"{name}.mlp.gate_up_proj.weight:0:1:96",
        f"{name}.mlp.down_proj.weight:1",
    }
    assert {str(s) for s in groups.slots(f"{name}.self_attn.qkv_proj") if "qkv" in s.tensor} == {
        f"{name}.self_attn.qkv_proj.weight:0:32",
        f"{name}.self_attn.qkv_proj.weight:0:16:64",
        f"{name}.self_attn.qkv_proj.weight:0:16:96",
    }


def test_convolutions():
    groups = find_groups(*FAMILIES["conv flatten linear"]())
    assert slots(groups, "conv") == {
        "conv.weight:0",
        "conv.bias:0",
        *(f"norm.{name}:0" for name in ("weight", "bias", "running_mean", "running_var")),
        "hidden.weight:1:16",  # 4 × 4 pixels of a channel
    }
    groups = find_groups(*FAMILIES["unet"]())
    assert {s for s in slots(groups, "down1.0") if s.startswith("join")} == {"join1.0.weight:1:1:8"}  # behind up1's 8
    assert {s for s in slots(groups, "up1#2") if s.startswith("join")} == {"join1.0.weight:1"}
    groups = find_groups(*FAMILIES["dense block"]())
    assert {s for s in slots(groups, "layers.0.0") if s.endswith("weight:1:1:6")} == {
        "layers.1.0.weight:1:1:6",
        "layers.2.0.weight:1:1:6",
        "head.weight:1:1:6",
    }
    groups = find_groups(*FAMILIES["grouped convolutions"]())
    assert slots(groups, "stem") == {
        "stem.weight:0:4", "stem.bias:0:4", "grouped.weight:0:6", "grouped.bias:0:6", "transposed.weight:0:6",
        "transposed.bias:0:4", "multiplier.weight:0:8", "multiplier.bias:0:8", "head.weight:1:8",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("vgg19_bn", 16), ("resnet32", 18), ("wrn28_10", 16), ("resnet50", 37)])
def test_shipped_networks_are_sliced_everywhere(name: str, count: int):
    model, inputs = FAMILIES[name]()
    groups = find_groups(model, inputs)
    assert len(groups) == count
    whole = {tensor for tensor in groups.shapes if tensor not in groups.by_tensor}
    assert all(tensor.endswith("num_batches_tracked") or tensor == "classifier.bias" for tensor in whole)


def test_vit_heads_inside_a_threefold_projection():
    groups = find_groups(ViT(), images())
    assert {str(s) for s in groups.slots("attention.qkv") if s.tensor.endswith("qkv.weight")} == {
        "attention.qkv.weight:0:6",
        "attention.qkv.weight:0:6:24",
        "attention.qkv.weight:0:6:48",
    }
    assert {"token:2", "positions:2", "head.weight:1"} <= slots(groups, "residual")


def test_what_the_outputs_do_not_need_is_no_group_of_its_own():
    groups = find_groups(models.Unused(), vectors(6))
    assert units(groups) == {"first": 8}
    # The pooler reads the units, so it is sliced with them, although its own output goes nowhere.
    assert slots(groups, "first") == {"first.weight:0", "first.bias:0", "second.weight:1", "pooler.weight:1"}


def test_branches_of_training_are_seen():
    groups = find_groups(models.AuxiliaryHead(), vectors(6))
    assert "auxiliary.weight:1" in slots(groups, "stem")


def test_a_training_branch_that_cannot_run_is_left_out():
    class NeedsLabels(MLP):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            if self.training and labels is None:
                raise ValueError("labels, please")
            return super().forward(x)

    assert units(find_groups(NeedsLabels(), vectors(6))) == {"first": 8}


def test_a_width_of_a_training_branch_is_missed_by_name():
    class Auxiliary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 8)

    class TrainedView(MLP):
        def __init__(self):
            super().__init__()
            self.auxiliary = Auxiliary()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(self.auxiliary(hidden) if self.training else hidden)

    with pytest.raises(UserError, match=r"does not run; .* in training: auxiliary \(Auxiliary\)"):
        find_groups(TrainedView(), vectors(6))


def test_the_model_and_its_inputs_are_left_alone():
    model, inputs = FAMILIES["llama"]()
    model.train()
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    find_groups(model, inputs)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["tuple", "keywords"])
def test_inputs_and_outputs_in_any_container(form: str):
    class Wrapped(MLP):
        def forward(self, x: Tensor, extra: Any = None) -> Any:  # type: ignore[override]
            return {"nested": [SimpleNamespace(unread=1), (super().forward(x),)]}

    inputs = vectors(6) if form == "tuple" else {"x": vectors(6)[0], "extra": None}
    groups = find_groups(Wrapped(), inputs)
    assert units(groups) == {"first": 8}
    verify_groups(Wrapped(), groups, inputs)


def eight_billion_parameters() -> Callable[[], None]:
    """Half of the time goes to a copy, sliced, that must show the same groups."""
    model = llm(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip

    def measured() -> None:
        start = time.process_time()
        groups = find_groups(model, tokens())
        assert time.process_time() - start < 20
        assert len(groups) == 65 and groups["residual"].units == 4096
        assert len(str(groups).splitlines()) == 6, "32 layers are one row"
        assert "model.layers.{0-31}.self_attn" in str(groups)

    return measured


def test_eight_billion_parameters():
    """DESIGN: under 20 s (of the CPU, for machines that are shared) and 2 GB; one matrix in float32 is 224 MiB."""
    assert growth(eight_billion_parameters) < 2**28


class StoredState(nn.Module):
    """A recurrent cell whose first state has a size of its own; behind it a layer that has nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.inputs, self.state = nn.Linear(6, 8), nn.Linear(8, 8)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 8)
        for step in x.unbind(1):
            state = torch.tanh(self.inputs(step) + self.state(state))
        return self.head(torch.relu(self.hidden(state)))


def test_a_size_written_in_the_code_leaves_what_it_meets_whole():
    """Unlike the state of `gru by hand`, whose size is read off a tensor."""
    groups = find_groups(StoredState(), vectors(7, 6))
    assert units(groups) == {"hidden": 12}
    assert verify_groups(StoredState(), groups, vectors(7, 6)) < 1e-5


class Cached(MLP):
    """Remembers a constant for all its instances."""

    @staticmethod
    @functools.lru_cache
    def scale(width: int) -> Tensor:
        return torch.full((width,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.scale(5)


def test_fake_tensors_do_not_stay_behind():
    groups = find_groups(Cached(), vectors(6))
    assert type(Cached()(*vectors(6))) is Tensor
    assert verify_groups(Cached(), groups, vectors(6)) < 1e-5


class Remembering(MLP):
    """Keeps what it computed last, and reads it the next time."""

    def __init__(self):
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        before, self.last = self.last, hidden
        return self.second(hidden if before is None else hidden + before)


def test_modules_that_keep_what_they_computed_are_run_afresh():
    groups = find_groups(Remembering(), vectors(6))
    assert units(groups) == {"first": 8}
    assert verify_groups(Remembering(), groups, vectors(6)) < 1e-5


# What is left whole where that is asked for


class TwoWidths(nn.Module):
    """Blocks with a width stored in an attribute, and a stream between them."""

    class Block(nn.Module):
        def __init__(self, stored: bool):
            super().__init__()
            self.up, self.down, self.width = nn.Linear(10, 12), nn.Linear(12, 10), 12 if stored else -1

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)).view(len(x), self.width))

    class Stored(Block):
        pass

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 10), nn.Linear(10, 5)
        self.blocks = nn.ModuleList([self.Stored(True), self.Block(False), self.Stored(True)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_groups_inside_modules_with_a_width_of_unknown_rule_are_dropped_when_asked():
    with pytest.raises(
        UserError, match=r"blocks.0 \(Stored\) .*leave it unsliced \(pin_unknown\)|pin_unknown.*blocks.0"
    ):
        find_groups(TwoWidths(), vectors(6))
    groups = find_groups(TwoWidths(), vectors(6), pin_unknown=True)
    assert units(groups) == {"residual": 10, "blocks.1.up": 12}
    assert verify_groups(TwoWidths(), groups, vectors(6)) < 1e-5


# Errors


class Numbered(nn.Module):
    """Holds a width as a number in the code; the layers after it do not."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(10, 256)
        self.convs = nn.Sequential(
            nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 20, 1), nn.ReLU(), nn.Conv2d(20, 3, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.convs(self.lift(z).view(-1, 16, 4, 4))


@pytest.mark.parametrize("model", [Numbered(), nn.Sequential(Numbered())], ids=["root", "inside"])
def test_only_the_groups_that_a_number_in_the_code_holds_are_dropped(model: nn.Module) -> None:
    inputs = (torch.randn(3, 10),)
    with pytest.raises(UserError, match="pin_unknown"):
        find_groups(model, inputs)
    groups = find_groups(model, inputs, pin_unknown=True)
    assert sorted(units(groups).values()) == [20, 24]
    assert verify_groups(model, groups, inputs) < 1e-5


class Crossed(nn.Module):
    """One group's width shapes another, which is as wide."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(x).reshape(len(x), self.a(x).shape[1]) + self.a(x).sum(1, keepdim=True))


def test_a_width_taken_from_another_group_does_not_pass_for_right() -> None:
    with pytest.raises(UserError, match="does not run"):
        find_groups(Crossed(), (torch.randn(3, 6),))
    with pytest.raises(UserError, match="does not run") as caught:
        find_groups(Crossed(), (torch.randn(3, 6),), pin_unknown=True)  # neither goes without the other
    assert "pin_unknown" not in str(caught.value)


class Outer(nn.Module):
    """Stores the width of one of its layers."""

    def __init__(self):
        super().__init__()
        self.n, self.first, self.last = 16, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.last(self.first(x).new_zeros(self.n))
        return self.last(self.first(x))


def test_a_number_that_a_module_around_stores_is_named() -> None:
    with pytest.raises(UserError, match=r"last \(Linear\) raised .*\(the model stores n=16\)"):
        find_groups(Outer(), (torch.randn(3, 6),))


class FFT(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.fft.fft(self.first(x)).real)))


def test_an_op_without_a_rule_is_named_with_its_module():
    model = nn.Sequential(nn.Linear(6, 6), FFT())
    with pytest.raises(
        UserError, match=r"^1 \(FFT\) uses aten::_fft_r2c, an op without a rule: add one with @.*rule\("
    ) as caught:
        find_groups(model, vectors(6))
    assert "\n" not in str(caught.value)
    assert units(find_groups(model, vectors(6), pin_unknown=True)) == {"0": 6, "1.second": 10}


def test_a_rule_may_be_added(monkeypatch: pytest.MonkeyPatch):
    with torch.library._scoped_library("offload_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

        class Twice(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.ops.offload_test.twice(self.first(x)))

        with pytest.raises(UserError, match="offload_test::twice"):
            find_groups(Twice(), vectors(6))
        rule("offload_test::twice")(pointwise)
        assert units(find_groups(Twice(), vectors(6))) == {"first": 8}
        del RULES["offload_test::twice"]


class Replacing(MLP):
    """Makes a module of its own when it is called, of a width that is known to it alone."""

    def forward(self, x: Tensor) -> Tensor:
        self.second = self.second if len(self.second.weight.t()) == 8 else nn.Linear(8, 5)
        return super().forward(x)


class Looked(MLP):
    """Indices that are themselves as many as there are units."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.arange(8) % 6)
        self.third = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * (self.places > 2)) + self.third(x[:, self.places])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.recurrent, self.head = nn.Embedding(61, 12), nn.LSTM(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x))[0])


class Nothing(MLP):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        super().forward(x)


class Deciding(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if hidden.sum() > 0 else -hidden)


class FixedWidth(MLP):
    """A view to a number that is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 8))


class Rotated(MLP):
    """Cut at a fixed place and glued the other way round: a sliced copy would run, and be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(torch.cat([hidden[:, 4:], hidden[:, :4]], 1))


class FixedHeads(nn.Module):
    """The number of heads stays while their width gives way: a sliced copy would run, and be wrong."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(6, 5), vectors(6), "no group of units found in Linear: every axis is pinned .*an output"),
        (Recurrent(), (torch.zeros(3, 7, dtype=torch.long),), "no group .*LSTM computes its widths itself"),
        (Nothing(), vectors(6), "the model cannot be traced: it returns no tensor"),
        (Replacing(), vectors(6), r"a sliced subnetwork does not run; .* the model \(Replacing\)"),
        (
            nn.Sequential(nn.LazyLinear(5)),
            vectors(6),
            "0.weight of a lazy module has no shape yet: call the model once",
        ),
        (nn.Sequential(torch.compile(MLP(), backend="eager")), vectors(6), r"0 \(OptimizedModule\) is compiled"),
        (Looked(), vectors(6), "every axis is pinned .*chosen by index"),
        (Deciding(), vectors(6), r"cannot be traced: the model \(Deciding\) asks what is in a tensor"),
        (MLP(), vectors(7), r"the model cannot be traced: first \(Linear\) raised RuntimeError"),
        (MLP(), (1, 2, 3), r"the model cannot be traced: the model \(MLP\) raised TypeError"),
        (FixedWidth(), vectors(6), r"a sliced subnetwork does not run; add a rule \(widths=…\)"),
        (Rotated(), vectors(6), "group 'first' is not the same in a sliced subnetwork: second or a module around"),
        (FixedHeads(), vectors(11, 6), "does not run; add a rule|not the same in a sliced subnetwork"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sliced_is_one_line(model: nn.Module, inputs: tuple, message: str):
    with pytest.raises(UserError, match=message) as caught:
        find_groups(model, inputs)
    assert "\n" not in str(caught.value)
