"""The tools that measure what the paper claims: each at its quick size, and what they compute."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload_trainer import Plan, Structure, UserError, find_groups
from tests.runs import ROOT, images, metrics, timed_in_this_process


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The modules; runs that they launch cost no start of a process."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    names = (
        "contest",
        "cost",
        "figure4",
        "frontier",
        "interval",
        "recipe",
        "runs",
        "table5",
        "timed",
        "variance",
        "variants",
        "wide",
    )
    found = {name: importlib.import_module(f"reproduction.{name}") for name in names}
    tools = SimpleNamespace(**found, reproduce=importlib.import_module("reproduce"))
    tools.launched = timed_in_this_process(monkeypatch)
    images(tmp_path / "data" / "cifar10", 32)
    return tools


def records(tools: SimpleNamespace, name: str, *arguments: str) -> list[dict[str, Any]]:
    """What a quick run of a tool writes: its JSON, and a picture beside it."""
    assert tools.reproduce.main([name, "--quick", *arguments]) == 0
    found = json.loads((Path("runs") / f"{name}-quick" / f"{name}.json").read_text())
    assert (Path("runs") / f"{name}-quick" / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    for record in found:
        details = record["details"]
        assert record["name"] == name and record["case"].endswith(" quick") and record["device"]
        assert math.isfinite(record["value"]) and math.isfinite(record["ratio"])
        assert record["versions"]["torch"] == torch.__version__
        assert details["command"].startswith(f"python tools/reproduce.py {name} --quick")
        assert name == "cost" or details["settings"]["steps"] > 0
    lines = [line for line in getattr(tools, name).rows(found) if line.startswith("|")]
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1  # a table: as many cells in every row
    return found


def test_table5(tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    found = records(tools, "table5")
    dense, large, large_fixed, published, small, *_ = found
    assert [r["details"]["keep"] for r in found] == [1, *3 * [0.4869], *3 * [0.0894]]
    assert [r["details"]["contender"] for r in found] == ["dense", *2 * ["ours", "fixed", "paper"]]
    assert dense["ratio"] == 1 and dense["details"]["share"] == 1
    assert 0.1 < large["details"]["share"] < 0.4 and small["details"]["share"] < large["details"]["share"]
    assert large_fixed["case"] == large["case"].replace(" quick", ", fixed quick")
    for record in found:
        d = record["details"]
        assert d["steps"] == 3 and d["curve"]
        assert 0 < d["forward_minutes"] + d["backward_minutes"] < d["train_minutes"]
    assert large["details"]["paper"] == {"lost": pytest.approx(0.38), "faster": 1.55, "share": 0.2371}
    launched = list(tools.launched)
    chosen = published["details"]["settings"]
    assert chosen["sync_every"] == 1 and chosen["structure.estimator"] == "vr_pge"  # with the shipped config's others
    assert chosen["structure.sampler"] == "bernoulli" and chosen["structure.budget"] == "global"
    assert len(launched) == 7
    assert len(records(tools, "table5")) == 7  # all of it is done
    assert tools.launched == launched
    assert tools.reproduce.main(["table5", "--quick", "--structure.samples", "3", "--json", "other.json"]) == 2
    assert "holds a run with other arguments" in capsys.readouterr().err


def test_a_run_that_was_interrupted_goes_on(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes are those of as many steps as it has."""
    words = ["--steps", 6, "--checkpoint.every", 2, "--task.data", "data/cifar10", "--task.width", 0.125]
    words += ["--track.log_every", 1, *tools.runs.SHORT]
    step, out = tools.timed.TimedOffloader.step, Path("runs") / "one"

    def interrupted(self: Any) -> None:
        step(self)
        if self.steps == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as first, pytest.raises(UserError):
        first.setattr(tools.timed.TimedOffloader, "step", interrupted)
        tools.runs.finish(out, "vgg19_cifar10", words)
    timed = json.loads((out / "passes.json").read_text())
    assert timed["steps"] == 4 and not (out / "summary.json").exists()
    run = tools.runs.finish(out, "vgg19_cifar10", words)
    assert [record["step"] for record in metrics(out)] == list(range(7))
    again = json.loads((out / "passes.json").read_text())
    assert again["steps"] == 6 and run.passes["backward"] == again["backward"] > timed["backward"]
    (out / "passes.json").write_text(json.dumps(again | {"steps": 8}))  # as of a run that was killed, not interrupted
    assert tools.runs.finish(out, "vgg19_cifar10", words).passes["forward"] == pytest.approx(again["forward"] * 6 / 8)
    with pytest.raises(UserError, match="holds a run with other arguments"):
        tools.runs.finish(out, "vgg19_cifar10", [*words, "--seed", 1])


def test_figure4(tools: SimpleNamespace) -> None:
    found = records(tools, "figure4")
    assert [record["details"]["step"] for record in found] == [2, 4]
    for record in found:
        d = record["details"]
        assert d["losses"] > d["pairs"] > 0 and d["largest"] >= d["pairs"]


def test_what_pairs_show_equals_the_plain_formulas(tools: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    masks = torch.rand(5, 2, 3, generator=generator) < 0.5
    masks[:, :, 2] = True  # never left out
    point = tools.figure4.point(losses, masks)
    squares = [[(a - b) ** 2, (a - b) ** 2] for a, b in losses.tolist()]
    means = []
    for unit in range(3):
        for value in (False, True):
            given = [squares[i][j] for i in range(5) for j in range(2) if bool(masks[i, j, unit]) == value]
            means += [sum(given) / len(given)] if given else []
    assert point.losses == pytest.approx(sum(x * x for x in losses.flatten().tolist()) / 10)
    assert point.pairs == pytest.approx(sum(map(sum, squares)) / 10)
    assert point.largest == pytest.approx(max(means))


def test_interval(tools: SimpleNamespace) -> None:
    found = records(tools, "interval", "--seeds", "3", "--tasks", "image", "--structure.estimator", "vr_pge")
    assert [(r["details"]["every"], r["details"]["seed"]) for r in found] == [(1, 3), (2, 3)]
    assert found[0]["unit"] == "% accuracy" and found[0]["ratio"] == 1
    for record, value, against, seed in (
        (0, 50.0, 50.0, 4),
        (1, 53.0, 50.0, 4),
        (0, 52.0, 52.0, 5),
        (1, 54.0, 52.0, 5),
    ):
        details = found[record]["details"] | {"seed": seed, "against_value": against}
        found.append(found[record] | {"value": value, "details": details})
    found[0]["value"] = found[0]["details"]["against_value"] = found[1]["details"]["against_value"] = 51.0
    found[1]["value"] = 55.0
    ((size, _, (first, second)),) = tools.interval.summarised(found)
    assert size == "ResNet-32 width 0.125, 2 steps" and (first["every"], second["every"]) == (1, 2)
    assert first["level"][0] == pytest.approx(51) and first["change"] == (0, 0)
    assert second["level"][0] == pytest.approx(54) and second["change"] == pytest.approx((3, 2.48), rel=1e-2)


def test_interval_on_text(tools: SimpleNamespace) -> None:
    found = records(tools, "interval", "--intervals", "2", "--tasks", "text")
    assert found[0]["unit"] == "nats per byte" and 0 < found[0]["value"] < 7


def test_a_confidence_interval_is_students(tools: SimpleNamespace) -> None:
    mean, half = tools.interval.confidence([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(3.7946, rel=1e-3)
    assert math.isnan(tools.interval.confidence([1.0])[1])


def test_cost(tools: SimpleNamespace) -> None:
    (record,) = records(tools, "cost")
    d = record["details"]
    by, share = d["times_as_cheap"], d["share"]
    assert d["flops"]["dense_backward"] == pytest.approx(2 * d["flops"]["dense_forward"], rel=0.1)
    assert by["formula"]["GrowEfficient"] == pytest.approx(3 / (2 + share)) and by["formula"]["GrowEfficient"] < 1.5
    assert by["formula"]["paper"] == pytest.approx(3 / (4 * share))
    assert by["formula"]["ours"] == pytest.approx(3 / (3.08 * share))  # 4 pairs in 50 steps
    for name, value in by["formula"].items():
        assert by["FLOPs"][name] == pytest.approx(value, rel=0.15)  # the first layer has no backward to its input
    assert set(by["time"]) == set(by["formula"]) and all(value > 0 for value in by["time"].values())


def test_wide(tools: SimpleNamespace) -> None:
    small, ours, unscaled = records(tools, "wide", "--structure.sampler", "fixed", "--structure.budget", "per_group")
    assert small["ratio"] == 1
    assert ours["details"]["master_parameters"] > 10 * small["details"]["parameters"]
    assert ours["details"]["parameters"] == small["details"]["parameters"]
    more = ours["details"]["device_bytes"] / small["details"]["device_bytes"]
    assert 1 <= more < 1.5  # a reference, and of so small a batch the master takes a little more
    assert ours["details"]["host_bytes"] > 0
    differing = ours["details"]["settings"].items() ^ unscaled["details"]["settings"].items()
    assert differing == {("structure.rescale", False)}


def test_variance(tools: SimpleNamespace) -> None:
    found = records(tools, "variance", "--tasks", "text", "--pairs", "12")
    by_kind = {kind: {} for kind in tools.variance.KINDS}
    for record in found:
        d = record["details"]
        by_kind[d["kind"]][d["estimator"]] = record
        assert record["ratio"] == pytest.approx(record["value"] / d["against_value"])
    for kind, of in by_kind.items():
        assert list(of) == tools.variance.NAMES, kind
        assert of["vr_pge"]["ratio"] == 1 and 0.2 < of["rloo"]["ratio"] < 0.9


def test_frontier(tools: SimpleNamespace) -> None:
    dense, ours, grown = records(tools, "frontier", "--tasks", "text")
    for record, name, times in ((dense, "dense ×1", 1), (ours, "ours ×2", 2), (grown, "grown", 4)):
        d = record["details"]
        assert (d["contender"], d["times"]) == (name, times)
        assert d["parameters"] == dense["details"]["parameters"] and d["device_bytes"] > 0 and d["curve"]
        assert record["ratio"] == pytest.approx(record["value"] / dense["value"])
        assert d["time"] == pytest.approx(d["seconds"] / dense["details"]["seconds"])
    assert grown["details"]["master_parameters"] > ours["details"]["master_parameters"] > dense["details"]["parameters"]
    other = [r | {"value": r["value"] + 0.1, "details": r["details"] | {"seed": 1}} for r in (dense, ours)]
    of_ours = [line for line in tools.frontier.rows([dense, ours, *other]) if "ours" in line]
    assert len(of_ours) == 1 and of_ours[0].endswith("| 2 |") and "±" in of_ours[0]


def test_recipe_changes_one_thing_at_a_time(tools: SimpleNamespace) -> None:
    dense, base, rloo = records(tools, "recipe", "--tasks", "image")
    assert [r["details"]["contender"] for r in (dense, base, rloo)] == ["dense ×1", "base: explore 0.1", "rloo"]
    one, other = base["details"]["settings"], rloo["details"]["settings"]
    assert one.pop("structure.estimator") == "credit" and one == other  # rloo is the default
    assert one["steps"] == 4 and one["task.model"] == "vgg19_bn"
    assert base["details"]["master_parameters"] > 4 * base["details"]["parameters"]


def test_recipe_of_text(tools: SimpleNamespace) -> None:
    """Which groups are sampled, and what no key asks for, of subnets as large as the others'."""
    only = ["MLP features alone", "residual stream too", "taught", "ρ falls from a half"]
    found = records(tools, "recipe", "--tasks", "text", "--text-steps", "10", "--only", *only)
    assert [r["details"]["contender"] for r in found] == ["dense ×1", only[3], *only[:3]]
    assert len({r["details"]["parameters"] for r in found}) == 1
    assert found[1]["details"]["settings"]["structure.schedule_steps"] == 2
    losses = [r["value"] for r in found]
    assert len(set(losses)) == len(losses)


def test_a_run_of_a_config_that_has_changed_is_not_taken(tools: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (ROOT / "configs" / "vgg19_cifar10.yaml").read_text()
    words = ["--steps", 2, "--task.data", "data/cifar10", "--task.width", 0.125, *tools.runs.SHORT]
    file.write_text(text)
    assert tools.runs.finish(Path("runs/one"), file, words).settings["optimizer.lr"] == 0.1
    file.write_text(text.replace("lr: 0.1", "lr: 0.2"))
    with pytest.raises(UserError, match="of a config that has changed"):
        tools.runs.finish(Path("runs/one"), file, words)
    assert len(tools.launched) == 1


def test_records_of_other_keys_are_not_mixed(tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["interval", "--quick", "--tasks", "image", "--intervals", "1"]
    assert tools.reproduce.main(words) == 0
    again = [*words, "--seeds", "1", "--out", "runs/other", "--optimizer.lr", "0.2"]
    file = "runs/interval-quick/interval.json"
    assert tools.reproduce.main([*again, "--json", file]) == 2
    assert f"{file} has 'ResNet-32 width 0.125, 2 steps' with other keys" in capsys.readouterr().err
    assert len(json.loads(Path(file).read_text())) == 1
    assert tools.reproduce.main([*again, "--json", "runs/other/i.json"]) == 0  # what it ran is not lost
    assert len(tools.launched) == 2


def test_contenders_are_called_by_names_that_can_be_typed(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(*only: str) -> list[str]:
        options = tools.reproduce.parse(["frontier", "--only", *only])
        return [one.name for one in tools.contest.chosen(options, tools.frontier.CONTENDERS)]

    assert named("ours x4", "dense ×½") == ["dense ×1", "dense ×½", "ours ×4"] == named("dense x0.5", "ours ×4")
    assert tools.reproduce.main(["frontier", "--quick", "--only", "grwon"]) == 2
    assert "--only: no contender is called 'grwon'; there are 'dense ×1'" in capsys.readouterr().err
    assert not tools.launched


def test_options_are_not_abbreviated(tools: SimpleNamespace) -> None:
    """`--seed` would be `--seeds` where there is no `--seed`, and a key of a config elsewhere."""
    options = tools.reproduce.parse(["table5", "--seed", "3", "--qui"])
    assert options.seeds != [3] and options.passed_on == ["--seed", "3", "--qui"] and not options.quick


def test_without_matplotlib_one_line_says_so(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pictures need matplotlib"):
        importlib.import_module("reproduction.pictures").new_figure()


def test_keys_of_the_structure_are_for_sparse_runs_alone(tools: SimpleNamespace) -> None:
    options = tools.reproduce.parse(
        ["table5", "--structure.keep", "0.5", "--memory.autocast", "bf16", "--structure.lr=1", "--epochs", "2"]
    )
    assert options.of_structure == ["--structure.keep", "0.5", "--structure.lr=1"]
    assert options.passed_on == ["--memory.autocast", "bf16"] and options.epochs == 2
    assert options.json == ROOT / "tools" / "results" / "table5.json"


def test_what_is_neither_an_option_nor_a_key_is_refused(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tools.reproduce.parse(["cost", "vgg19"])
    assert "unexpected argument: vgg19" in capsys.readouterr().err
    assert tools.reproduce.main(["cost", "--quick", "--picture", "nowhere/cost.svg"]) == 2
    assert capsys.readouterr().err == "--picture nowhere/cost.svg cannot be written: its folder must be there\n"


def variant(tools: SimpleNamespace, name: str | None, folder: Path) -> list[tuple[Plan, dict[str, Tensor]]]:
    """Plans of four rounds of one step, and what the master held after each; without a name, of an ordinary run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    groups = find_groups(model, (torch.zeros(3, 8),))
    folder.mkdir()
    made = tools.variants.VARIANTS.get(name, tools.timed.TimedOffloader)(
        model,
        groups,
        lambda module, x: module(x).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        structure=Structure(groups, 0.5, lr=0),
        sync_every=1,
        overlap=False,
        file=folder / "passes.json",
    )
    found = []
    with made as trainer:
        for batch in torch.randn(4, 5, 8):
            trainer.accelerator.backward(trainer.loss(batch))
            plan = trainer.plan
            trainer.step()
            found.append((plan, {name: tensor.clone() for name, tensor in trainer.master.items()}))
    return found


def test_newcomers_move_twice_as_far(tools: SimpleNamespace, tmp_path: Path) -> None:
    (_, start), (plan, ordinary), *_ = variant(tools, None, tmp_path / "ordinary")
    (before, first), (same_plan, fast), *_ = variant(tools, "faster newcomers", tmp_path / "fast")
    assert plan == same_plan and all(torch.equal(first[name], tensor) for name, tensor in start.items())
    new = torch.zeros(24, dtype=torch.bool)
    new[plan["0"][~torch.isin(plan["0"], before["0"])]] = True
    assert 0 < new.sum() < 12
    moved, twice = (after["0.weight"] - start["0.weight"] for after in (ordinary, fast))
    torch.testing.assert_close(twice[new], 2 * moved[new])
    assert torch.equal(twice[~new], moved[~new]) and not torch.equal(twice, moved)


def test_the_master_keeps_going_where_rounds_have_moved_it(tools: SimpleNamespace, tmp_path: Path) -> None:
    rounds = variant(tools, "outer momentum", tmp_path / "outer")
    torch.manual_seed(0)
    was = nn.Linear(8, 24).weight.detach()
    last = torch.zeros(24, 8)
    for plan, master in rounds:
        moved, out = master["0.weight"] - was, torch.ones(24, dtype=torch.bool)
        out[plan["0"]] = False
        torch.testing.assert_close(moved[out], 0.5 * last[out])  # nothing else moves those outside
        was, last = master["0.weight"], moved
    assert last.abs().sum() > 0
