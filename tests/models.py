"""Tiny networks, each with one thing that makes slicing hard; `FAMILIES` maps a name to (model, example inputs)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

from offload_trainer.tasks.vision_models import build_model

VOCABULARY = 61  # odd, and no width of any model here


def llm(kind: str, *, device: str = "meta", **settings: Any) -> nn.Module:
    """A language model of transformers: 2 layers, 4 heads of 16, 2 key/value heads where it has any of their own."""
    common = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    if kind != "gpt2":
        common |= dict(intermediate_size=96, max_position_embeddings=64)
    if kind not in ("gpt2", "gpt_neox", "opt", "bert"):
        common |= dict(num_key_value_heads=2)
    config = AutoConfig.for_model(kind, **(common | settings))
    with torch.device(device):
        return (AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM).from_config(config)


def moe(kind: str, *, device: str = "meta", **settings: Any) -> nn.Module:
    """A mixture of experts of transformers: in both layers 4 experts, of which 2 are chosen."""
    sizes = dict(moe_intermediate_size=24, num_experts_per_tok=2, num_local_experts=4, num_experts=4)
    if kind.startswith("deepseek"):
        sizes |= dict(num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=24, first_k_dense_replace=0, n_group=1)
        sizes |= dict(qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, head_dim=8, topk_group=1)
        sizes |= dict(n_routed_experts=4, mlp_layer_types=["sparse", "sparse"])
    known = AutoConfig.for_model(kind).to_dict()
    return llm(kind, device=device, **{key: value for key, value in (sizes | settings).items() if key in known})


def classifier(kind: str, *, device: str = "meta", **settings: Any) -> nn.Module:
    """An image classifier of transformers, for 5 classes."""
    config = AutoConfig.for_model(kind, num_labels=5, **settings)
    with torch.device(device):
        return AutoModelForImageClassification.from_config(config)


def efficientnet_lite(device: str = "meta") -> nn.Module:
    """EfficientNet-Lite0 of its package, a quarter as wide and a third as deep."""
    with torch.device(device):
        return EfficientNet.from_name(
            "efficientnet-lite0", width_coefficient=0.25, depth_coefficient=0.3, num_classes=5, image_size=32
        )


def tokens(batch: int = 3, length: int = 11) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator), "use_cache": False}


def images(channels: int = 3, size: int = 16) -> tuple[Tensor]:
    return (torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def vectors(*shape: int) -> tuple[Tensor]:
    return (torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)),)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **settings),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class MLP(nn.Module):
    """The smallest model with a group: 6 → 8 → 5."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class UNet(nn.Module):
    """Skips by concatenation; a transposed convolution up."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.join2, self.join1 = conv(24, 10), conv(16, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        hidden = self.middle(F.max_pool2d(two, 2))
        hidden = self.join2(torch.cat([self.up2(hidden), two], 1))
        return self.head(self.join1(torch.cat([self.up1(hidden), one], 1)))


class DenseBlock(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 6)
        self.layers = nn.ModuleList([conv(6 + 4 * i, 4) for i in range(3)])
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project; the residual joins projections."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = conv(3, 8), conv(8, 24, 1)
        self.depthwise = conv(24, 24, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = self.depthwise(self.expand(x))
        scale = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(hidden, 1)))).sigmoid()
        return self.head((x + self.project(hidden * scale)).mean((2, 3)))


class GroupedConvolutions(nn.Module):
    """Grouped (also transposed) convolutions: whole groups are units."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.transposed = nn.ConvTranspose2d(24, 16, 2, stride=2, groups=4)
        self.multiplier = nn.Conv2d(16, 32, 3, groups=16)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.transposed(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        return self.head(self.multiplier(x).mean((2, 3)))


class Norms(nn.Module):
    """Every norm with weights: whole norm groups are units, single-group norms are over what is kept."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 12), (12, 8), (8, 10))])
        self.norms = nn.ModuleList([nn.GroupNorm(4, 16), nn.GroupNorm(1, 12), nn.InstanceNorm2d(8, affine=True)])
        self.act = nn.PReLU(10)
        self.layer, self.rms = nn.LayerNorm(10), nn.RMSNorm(14)
        self.inner, self.head = nn.Linear(10, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convs, self.norms, strict=False):
            x = torch.relu(norm(convolution(x)))
        x = self.act(self.convs[-1](x)).mean((2, 3))
        return self.head(self.rms(self.inner(self.layer(x))))


class NormsOverSeveralAxes(nn.Module):
    """Of which units are the last, the first, or the first of three."""

    def __init__(self):
        super().__init__()
        self.conv, self.maps = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm((8, 16, 16))
        self.inner = nn.Linear(16, 10)
        self.last, self.first = nn.LayerNorm((16, 10)), nn.LayerNorm((10, 16))
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.inner(torch.relu(self.maps(self.conv(x)))))
        return self.out(torch.relu(self.first(x.mT))).mean((2, 3))


class AffineFreeNorms(nn.Module):
    """Norms whose width no tensor mirrors: what they normalise stays whole, the rest is sliced."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 12)
        self.group, self.layer = nn.GroupNorm(4, 8, affine=False), nn.LayerNorm(12, elementwise_affine=False)
        self.rms, self.inner = nn.RMSNorm(12, elementwise_affine=False), nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.second(self.group(self.first(x)).mean((2, 3))))
        return self.head(torch.relu(self.inner(self.rms(self.third(x)))))


class Attention(nn.Module):
    """Fused qkv as (3, heads, features), heads read off an attribute (needs a width rule) unless `free`."""

    def __init__(self, width: int, heads: int, free: bool):
        super().__init__()
        self.heads, self.features, self.free = heads, width // heads, free
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (-1, self.features) if self.free else (self.heads, -1)
        q, k, v = self.qkv(x).reshape(batch, length, 3, *split).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.features**-0.5)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, -1))


class ViT(nn.Module):
    """Patches, class token, learned positions, pre-norm blocks."""

    def __init__(self, width: int = 24, heads: int = 4, free: bool = True):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, free)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class ConvFlattenLinear(nn.Module):
    """Channels become runs of height × width columns."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 4 * 4, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class SharedTwice(nn.Module):
    """One layer applied twice: its input and output units are the same; and a decoder tied to the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.layer = nn.Linear(6, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(self.encoder(x)))))
        return F.linear(x, self.encoder.weight.t(), self.bias)


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embed(x))))


class Unused(MLP):
    """A layer and a parameter that forward never reads, and a pooler whose output is thrown away."""

    def __init__(self):
        super().__init__()
        self.spare, self.pooler = nn.Linear(8, 7), nn.Linear(8, 9)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.pooler(hidden)
        return self.second(hidden)


class AuxiliaryHead(nn.Module):
    """A second output in training only."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(6, 8), nn.Linear(8, 10)
        self.auxiliary, self.head = nn.Linear(8, 5), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        out = self.head(torch.relu(self.body(x)))
        return (out, self.auxiliary(x)) if self.training else out


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass by, then the halves are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = conv(3, 16), conv(8, 8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        return self.head(x.mean((2, 3)))


class ChannelStatistics(nn.Module):
    """CBAM's spatial gate: mean and maximum over the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = conv(3, 8), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.head((x * self.gate(pooled).sigmoid()).mean((2, 3)))


class HandMadeGRU(nn.Module):
    """Gates by `chunk(3)`, state made by `new_zeros` of the width of another tensor."""

    def __init__(self):
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(6, 30), nn.Linear(10, 30), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), self.state.in_features)
        for step in x.unbind(1):
            (r, z, n), (rh, zh, nh) = self.inputs(step).chunk(3, -1), self.state(hidden).chunk(3, -1)
            update = torch.sigmoid(z + zh)
            hidden = (1 - update) * torch.tanh(n + torch.sigmoid(r + rh) * nh) + update * hidden
        return self.head(hidden)


class Mixer(nn.Module):
    """MLP over tokens and over channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.over_tokens = nn.Sequential(nn.Linear(11, 14), nn.GELU(), nn.Linear(14, 11))
        self.over_channels = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.over_tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.over_channels(self.norm(x))).mean(1))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, LayerNorm over the last axis, layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 12, 4, stride=4), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.scale, self.head = nn.Parameter(torch.ones(12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.down(F.gelu(self.up(hidden)))
        return self.head((x + hidden.permute(0, 3, 1, 2)).mean((2, 3)))


class LinearAttention(nn.Module):
    """One head, features φ(x) = elu(x) + 1: a dropped feature would not be zero there."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        summed = k.transpose(1, 2) @ self.v(x)
        return self.head((q @ summed) / (q @ k.sum(1, keepdim=True).transpose(1, 2))).mean(1)


class Experts(nn.Module):
    """A dense mixture of experts: softmax gates, einsum over stacked weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 5)
        self.up, self.down = nn.Parameter(torch.zeros(4, 12, 16)), nn.Parameter(torch.zeros(4, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        gates = self.router(x).softmax(-1)
        hidden = torch.relu(torch.einsum("bd,edf->bef", x, self.up))
        return self.head(x + torch.einsum("bef,efd,be->bd", hidden, self.down, gates))


class Maxout(nn.Module):
    """The largest of two pieces of one projection."""

    def __init__(self):
        super().__init__()
        self.pieces, self.head = nn.Linear(6, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(x).view(len(x), -1, 2).amax(-1))


class FiLM(nn.Module):
    """Scale and shift from one projection, sliced in half by the width of another tensor."""

    def __init__(self):
        super().__init__()
        self.body, self.condition, self.head = nn.Linear(6, 8), nn.Linear(6, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, film = self.body(x), self.condition(x)
        width = hidden.shape[-1]
        return self.head(torch.relu(hidden * film[:, :width] + film[:, width:]))


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.head = conv(3, 8), nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.pixel_shuffle(self.up(self.stem(x)), 2)))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(VOCABULARY, 8, mode="sum"), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(x)))


class CrossAttention(nn.Module):
    """Learned latents attend to the inputs through heads of an eager attention."""

    def __init__(self):
        super().__init__()
        self.latents, self.embed = nn.Parameter(torch.zeros(7, 16)), nn.Linear(6, 16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(len(x), -1, -1), self.embed(x)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(latents), self.k(x), self.v(x)))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1) @ v
        return self.head((latents + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer: its MultiheadAttention, and with it the residual stream, stay whole."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (MLP(), vectors(6)),
    "unet": lambda: (UNet(), images()),
    "dense block": lambda: (DenseBlock(), images()),
    "inverted residual": lambda: (InvertedResidual(), images()),
    "grouped convolutions": lambda: (GroupedConvolutions(), images()),
    "norms": lambda: (Norms(), images()),
    "norms over several axes": lambda: (NormsOverSeveralAxes(), images()),
    "affine-free norms": lambda: (AffineFreeNorms(), images()),
    "vit": lambda: (ViT(), images()),
    "conv flatten linear": lambda: (ConvFlattenLinear(), images()),
    "weight norm": lambda: (WeightNorm(), vectors(6)),
    "shared twice": lambda: (SharedTwice(), vectors(6)),
    "tied embedding": lambda: (TiedEmbedding(), (tokens()["input_ids"],)),
    "unused": lambda: (Unused(), vectors(6)),
    "auxiliary head": lambda: (AuxiliaryHead(), vectors(6)),
    "shuffle": lambda: (Shuffle(), images()),
    "channel statistics": lambda: (ChannelStatistics(), images()),
    "gru by hand": lambda: (HandMadeGRU(), vectors(7, 6)),
    "mixer": lambda: (Mixer(), vectors(11, 6)),
    "convnext block": lambda: (ConvNeXtBlock(), images()),
    "linear attention": lambda: (LinearAttention(), vectors(11, 6)),
    "experts": lambda: (Experts(), vectors(6)),
    "maxout": lambda: (Maxout(), vectors(6)),
    "film": lambda: (FiLM(), vectors(6)),
    "pixel shuffle": lambda: (PixelShuffle(), images()),
    "bags": lambda: (Bags(), (tokens()["input_ids"],)),
    "cross attention": lambda: (CrossAttention(), vectors(11, 6)),
    "encoder layer": lambda: (Encoder(), vectors(11, 6)),
    "vgg19_bn": lambda: (build_model("vgg19_bn", 10, width=0.125), images(size=32)),
    "resnet32": lambda: (build_model("resnet32", 10, width=0.5), images()),
    "wrn28_10": lambda: (build_model("wrn28_10", 10, width=0.1), images()),
    "resnet50": lambda: (build_model("resnet50", 10, width=0.125), images(size=32)),
    "llama": lambda: (llm("llama"), tokens()),
    "llama, tied": lambda: (llm("llama", tie_word_embeddings=True), tokens()),
    "qwen3": lambda: (llm("qwen3", head_dim=16), tokens()),
    "mistral": lambda: (llm("mistral"), tokens()),
    "gemma": lambda: (llm("gemma", head_dim=16), tokens()),
    "phi3": lambda: (llm("phi3", pad_token_id=0), tokens()),
    "gpt2": lambda: (llm("gpt2"), tokens()),
    "gpt_neox": lambda: (llm("gpt_neox"), tokens()),
    "opt": lambda: (llm("opt", ffn_dim=96, word_embed_proj_dim=64), tokens()),
}
