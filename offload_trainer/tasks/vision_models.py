"""The convolutional networks of the VR-PGE paper: VGG-19-BN, ResNet-32 and WRN-28-10 for small images, ResNet-50.

`width` multiplies every channel count (ResNet-32 with width 2 has the paper's doubled channels 32, 64, 128). Where a
shortcut changes shape it is a 1×1 convolution, never zero padding: padded channels have no parameter to slice. All end
in an adaptive average pool and one linear layer, so any image size works that survives the strides.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError

Scale = Callable[[int], int]
"""Channels at width 1 → channels."""

SMALLEST_IMAGE = {"vgg19_bn": 16}
"""Pixels a side below which a model's last feature map would be empty."""


def build_model(name: str, classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """One of `vgg19_bn`, `resnet32`, `wrn28_10`, `resnet50`, in torch's default initialisation (see `initialise`)."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    match name:
        case "vgg19_bn":
            return VGG19(scaled, classes, in_channels)
        case "resnet32":
            return ResNet32(scaled, classes, in_channels)
        case "wrn28_10":
            return WideResNet28(scaled, classes, in_channels)
        case "resnet50":
            return ResNet50(scaled, classes, in_channels)
    raise UserError(f"task.model ({name}) must be one of vgg19_bn, resnet32, wrn28_10, resnet50")


def initialise(model: nn.Module) -> None:
    """In place: convolutions Kaiming-normal on fan-out (He et al. 2015), BatchNorm γ=1, β=0, linear layers torch's own.

    Random from torch's global seed.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: the input, or a 1×1 convolution with BatchNorm where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class VGG19(nn.Module):
    """VGG-19 with BatchNorm for small images: 16 convolutions, 4 max pools, average pool, one linear layer."""

    def __init__(self, scaled: Scale, classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, (depth, base) in enumerate(((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [_conv(channels, scaled(base)), nn.BatchNorm2d(scaled(base)), nn.ReLU()]
                channels = scaled(base)
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, in_channels, H, W) → (batch, classes)
        return self.classifier(self.pool(self.features(images)).flatten(1))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, ReLU after the sum (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with a fourfold expansion; the 3×3 carries the stride (the variant known as v1.5)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, stride=stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        return torch.relu(self.bn3(self.conv3(hidden)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each 3×3 convolution (Zagoruyko & Komodakis 2016), without dropout.

    Where the shape changes, a bare 1×1 convolution takes the shortcut from the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        self.projection = _conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        return self.conv2(torch.relu(self.bn2(self.conv1(activated)))) + shortcut


class ResNet32(nn.Module):
    """ResNet-32 for small images: 3 stages of 5 basic blocks, 16, 32 and 64 channels at width 1."""

    def __init__(self, scaled: Scale, classes: int, in_channels: int):
        super().__init__()
        channels = scaled(16)
        self.conv1, self.bn1 = _conv(in_channels, channels), nn.BatchNorm2d(channels)
        blocks = []
        for stage, base in enumerate((16, 32, 64)):
            for block in range(5):
                blocks.append(BasicBlock(channels, scaled(base), stride=2 if stage and not block else 1))
                channels = scaled(base)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, in_channels, H, W) → (batch, classes)
        hidden = self.blocks(torch.relu(self.bn1(self.conv1(images))))
        return self.classifier(self.pool(hidden).flatten(1))


class WideResNet28(nn.Module):
    """WRN-28-10: a stem of 16 channels, 3 stages of 4 pre-activation blocks, 160, 320 and 640 channels at width 1."""

    def __init__(self, scaled: Scale, classes: int, in_channels: int):
        super().__init__()
        channels = scaled(16)
        self.conv1 = _conv(in_channels, channels)
        blocks = []
        for stage, base in enumerate((160, 320, 640)):
            for block in range(4):
                blocks.append(PreActivationBlock(channels, scaled(base), stride=2 if stage and not block else 1))
                channels = scaled(base)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, in_channels, H, W) → (batch, classes)
        hidden = torch.relu(self.bn(self.blocks(self.conv1(images))))
        return self.classifier(self.pool(hidden).flatten(1))


class ResNet50(nn.Module):
    """ResNet-50 v1.5 for ImageNet: 7×7 stem with max pool, stages of 3, 4, 6 and 3 bottlenecks."""

    def __init__(self, scaled: Scale, classes: int, in_channels: int):
        super().__init__()
        channels = scaled(64)
        self.conv1, self.bn1 = _conv(in_channels, channels, 7, stride=2), nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks = []
        for stage, (depth, base) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(channels, scaled(base), 4 * scaled(base), stride))
                channels = 4 * scaled(base)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, in_channels, H, W) → (batch, classes)
        hidden = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        return self.classifier(self.pool(self.blocks(hidden)).flatten(1))
