"""The paper's networks: sizes known from the literature, any image size, and an initialisation that is what it says."""

import math

import pytest
import torch
from torch import nn

from offload_trainer.errors import UserError
from offload_trainer.tasks.vision_models import SMALLEST_IMAGE, build_model, initialise

NAMES = ("vgg19_bn", "resnet32", "wrn28_10", "resnet50")


def meta(name: str, classes: int = 10, **arguments) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, classes, **arguments)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet50", 1000, 25_557_032),  # He et al.; the stride in the 3×3 changes no size
        ("wrn28_10", 10, 36_479_194),  # "36.5M", Zagoruyko & Komodakis, table 4
        ("vgg19_bn", 10, 20_035_018),  # 20.04M with the biases that BatchNorm makes useless
        ("resnet32", 10, 466_906),  # 464,154 and two 1×1 projections with BatchNorm in place of zero padding
    ],
)
def test_parameter_counts_are_the_known_ones(name, classes, parameters):
    assert sum(p.numel() for p in meta(name, classes).parameters()) == parameters


def test_width_2_doubles_the_channels_of_resnet32():
    channels = [m.out_channels for m in meta("resnet32", width=2.0).modules() if isinstance(m, nn.Conv2d)]
    assert sorted(set(channels)) == [32, 64, 128]
    half = [m.out_channels for m in meta("resnet32", width=0.5).modules() if isinstance(m, nn.Conv2d)]
    assert sorted(set(half)) == [8, 16, 32]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [28, 32, 45])
def test_any_image_size_and_grey_images_work(name, size):
    model = meta(name, classes=7, in_channels=1, width=0.25)
    assert model(torch.empty(3, 1, size, size, device="meta")).shape == (3, 7)


def test_the_smallest_image_of_vgg_is_the_smallest():
    size = SMALLEST_IMAGE["vgg19_bn"]
    model = meta("vgg19_bn", width=0.1)
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(torch.empty(2, 3, size - 1, size - 1, device="meta"))


@pytest.mark.parametrize("name", NAMES)
def test_no_shortcut_pads_so_every_shape_change_has_a_weight(name):
    for module in meta(name).modules():
        conv = getattr(module, "conv1", None)
        if hasattr(module, "conv2") and isinstance(conv, nn.Conv2d):
            shortcut = getattr(module, "projection", getattr(module, "shortcut", None))
            last = getattr(module, "conv3", module.conv2)
            if conv.in_channels != last.out_channels:
                assert any(isinstance(part, nn.Conv2d) for part in shortcut.modules())


@pytest.mark.parametrize("name", NAMES)
def test_initialise_fills_every_tensor_in_place_and_from_the_seed(name):
    model = meta(name, width=0.25).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(77)
    places = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    initialise(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert places == {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    assert not any((tensor == 77).any() for tensor in state.values())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
    torch.manual_seed(1)
    initialise(model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"task\.model \(vgg\) must be one of vgg19_bn, resnet32"):
        build_model("vgg", 10)
