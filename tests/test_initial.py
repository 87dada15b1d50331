"""First weights of a slice have the scale that a network of its own widths would have been given."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from offload_trainer import Offloader, Structure, find_groups, run
from offload_trainer.initial.scale import match_scale
from offload_trainer.tasks.vision_models import build_model, initialise
from tests import models, runs


def offloader(model: nn.Module, inputs: Any, keep: float) -> Offloader:
    groups = find_groups(model, inputs)
    return Offloader(
        model,
        groups,
        lambda module, batch: module(*batch).mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        structure=Structure(groups, keep=keep),
        accelerator=Accelerator(cpu=True),
    )


@pytest.mark.parametrize("name", ["vgg19_bn", "resnet32"])
def test_a_slice_has_the_scale_of_a_network_as_narrow(name: str) -> None:
    torch.manual_seed(0)
    wide, narrow = (build_model(name, 10, 3, width) for width in (0.5, 0.125))
    for model in (wide, narrow):
        initialise(model)
    before = {name: tensor.clone() for name, tensor in wide.named_parameters()}
    with offloader(wide, (torch.randn(2, 3, 32, 32),), 0.25) as trainer:
        state = torch.get_rng_state()
        changed = match_scale(trainer, initialise)
        assert torch.equal(torch.get_rng_state(), state)
        small = dict(trainer.export().named_parameters())
        assert changed == sum(not torch.equal(before[n], trainer.master[n]) for n in before) > 5
        for n, parameter in narrow.named_parameters():
            assert small[n].shape == parameter.shape
            if parameter.ndim > 1 and parameter.numel() > 1000:
                assert float(small[n].detach().std()) == pytest.approx(float(parameter.detach().std()), rel=0.12), n
            elif parameter.ndim < 2:
                assert torch.equal(trainer.master[n], before[n])
        assert match_scale(trainer, initialise) < changed / 2  # what is left is chance


def test_an_initialisation_that_does_not_depend_on_widths_is_left_alone() -> None:
    def normal(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)

    model = models.conv(3, 64)
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(64 * 16 * 16, 5))
    normal(model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with offloader(model, models.images(), 0.5) as trainer:
        assert match_scale(trainer, normal) <= 1  # the first layer's few weights leave room for chance
        assert torch.equal(trainer.master["2.weight"], before["2.weight"])


def test_a_run_scales_random_weights_once_and_stored_ones_never(tmp_path: Path) -> None:
    """And says so; a resumed run goes on with what it had."""
    runs.images(tmp_path / "data", 16)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({
        "steps": 4, "sync_every": 2, "out": str(tmp_path / "run"),
        "task": {"kind": "image_classification", "model": "resnet32", "width": 0.5, "data": str(tmp_path / "data"),
                 "batch_size": 4},
        "structure": {"keep": 0.5, "paired_batches": 1, "result_batches": 1}, "optimizer": {"lr": 1e-9, "kind": "sgd"},
        "checkpoint": {"every": 2}, "track": {"display": "plain"},
    }))  # fmt: skip
    weights = {}
    for name, words in {"scaled": [], "as it was": ["--structure.rescale", "false"]}.items():
        out = tmp_path / name
        assert run.main(["--config", str(config), "--out", str(out), *words]) == 0
        (file,) = (out / "checkpoints" / "step-00000002").glob("weights*.safetensors")
        weights[name] = load_file(file)
    ratio = {n: float(weights["scaled"][n].std() / weights["as it was"][n].std()) for n in weights["scaled"]
             if weights["scaled"][n].ndim == 4}  # fmt: skip
    assert median(ratio.values()) == pytest.approx(2**0.5, rel=0.1)
    assert (
        run.main(["--config", str(config), "--out", str(tmp_path / "scaled"), "--steps", "6", "--resume", "auto"]) == 0
    )
    (file,) = (tmp_path / "scaled" / "checkpoints" / "step-00000006").glob("weights*.safetensors")
    later = load_file(file)
    assert all(torch.allclose(later[n], weights["scaled"][n], atol=1e-4) for n in ratio)
