"""The config: every shipped file parses, overrides win, and whatever is wrong is one line that says what to mend."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from offload_trainer.config import CausalLM, Config, Custom, ImageClassification, parse
from offload_trainer.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
TEXT = {"kind": "causal_lm", "model": {"model_type": "llama", "hidden_size": 64}, "sequence": 8, "batch_size": 4}
IMAGES = {"kind": "image_classification", "model": "vgg19_bn", "data": "images", "batch_size": 4}


def write(path: Path, **tree: object) -> str:
    """A config file with these keys over the fewest that are needed."""
    path.write_text(yaml.safe_dump({"steps": 100, "task": IMAGES, "optimizer": {"lr": 0.1}} | tree))
    return str(path)


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


# What is shipped


def test_shipped_configs_are_those_of_readme():
    cifar = {"vgg19_cifar10", "resnet32_cifar10", "resnet32_cifar100", "wrn28_10_cifar10"}
    language = {"quickstart", "llama_from_scratch", "shrink_smollm2", "shrink_llama3_8b"}
    assert set(NAMES) == cifar | {"resnet50_imagenet"} | language


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_parses(name: str):
    config = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    assert config.out == f"runs/{name}"
    assert config.sync_every == (500 if name == "shrink_llama3_8b" else 50)
    assert config.structure.lr == (2e-3 if name == "shrink_smollm2" else 12e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if "cifar" in name])
def test_cifar_configs_have_the_papers_hyperparameters(name: str):
    config = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    task, optimizer = config.task, config.optimizer
    assert isinstance(task, ImageClassification)
    assert (task.batch_size, task.label_smoothing, task.width) == (256, 0, 2.0 if "resnet32" in name else 1.0)
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.warmup_steps) == ("sgd", 0.1, 0.9, 0)
    assert optimizer.schedule == "cosine"
    assert config.steps * 256 == pytest.approx(300 * 50_000, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if "cifar" in name or "imagenet" in name])
def test_the_papers_way_is_a_config_away(name: str):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(CONFIGS / "overlays" / "paper.yaml")]
    ours, paper = parse(words[:2]), parse(words)
    structure = paper.structure
    assert (paper.sync_every, structure.paired_batches, structure.reference) == (1, 1, "fresh")
    assert (structure.estimator, structure.sampler, structure.budget) == ("vr_pge", "bernoulli", "global")
    assert (structure.start, structure.settle, structure.lr, structure.samples) == ("uniform", 0, 12e-3, 10)
    assert (paper.task, paper.optimizer, paper.steps) == (ours.task, ours.optimizer, ours.steps)


def test_imagenet_config_has_the_papers_hyperparameters():
    config = parse(["--config", str(CONFIGS / "resnet50_imagenet.yaml")])
    assert isinstance(config.task, ImageClassification)
    assert (config.task.batch_size, config.task.label_smoothing) == (256, 0.1)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.256, 0.875)
    assert config.optimizer.warmup_steps > 0
    assert config.steps * 256 == pytest.approx(100 * 1_281_167, rel=1e-3)


# Overrides


def test_dotted_override_wins_wherever_it_stands_and_leaves_the_rest(tmp_path: Path):
    file = write(tmp_path / "mine.yaml", seed=3)
    for argv in (["--config", file, "--task.batch_size", "8"], ["--task.batch_size=8", f"--config={file}"]):
        config = parse(argv)
        assert config.task == ImageClassification(**IMAGES | {"batch_size": 8})
        assert (config.steps, config.seed, config.out) == (100, 3, "runs/mine")


def test_override_reaches_into_a_map_and_adds_to_it(tmp_path: Path):
    file = write(tmp_path / "c.yaml", task=TEXT, structure={"groups": {"*mlp*": 0.5, "layers.*": 0.1}})
    config = parse(["--config", file, "--task.model.hidden_size", "32", "--structure.groups.*head*", "0.25"])
    assert isinstance(config.task, CausalLM)
    assert config.task.model == {"model_type": "llama", "hidden_size": 32}
    assert config.structure.groups == {"*mlp*": 0.5, "layers.*": 0.1, "*head*": 0.25}
    replaced = parse(["--config", file, "--structure.groups", '{"a.b": 0.25}'])
    assert replaced.structure.groups == {"a.b": 0.25}


def test_later_file_is_laid_over_an_earlier_one(tmp_path: Path):
    base = write(tmp_path / "base.yaml")
    over = tmp_path / "over.yaml"
    over.write_text("task: {batch_size: 16}\n")
    config = parse(["--config", base, "--config", str(over)])
    assert (config.task, config.out) == (ImageClassification(**IMAGES | {"batch_size": 16}), "runs/over")


def test_values_are_read_as_yaml(tmp_path: Path):
    file = write(tmp_path / "c.yaml", optimizer={"lr": "3e-3"}, memory={"autocast": False})  # a bare `no`
    config = parse(["--config", file, "--structure.lr", "1e-2", "--out", "2026", "--dry-run"])
    assert (config.optimizer.lr, config.structure.lr, config.out) == (3e-3, 1e-2, "2026")
    assert (config.memory.autocast, config.dry_run) == ("no", True)
    assert parse(["--config", file, "--task.limit", "null"]).dry_run is False


def test_all_keys_can_come_from_the_command_line():
    argv = "--steps 5 --optimizer.lr 1 --task.kind custom --task.function package.module:make --task.arguments.n 3"
    config = parse(argv.split())
    assert config.task == Custom(kind="custom", function="package.module:make", arguments={"n": 3})


def test_null_ratio_follows_keep(tmp_path: Path):
    file = write(tmp_path / "c.yaml", structure={"groups": {"*mlp*": None, "*head*": 0.5}})
    config = parse(["--config", file, "--structure.keep", "0.1"])
    assert config.structure.ratios == {"*mlp*": 0.1, "*head*": 0.5}
    assert parse(["--config", write(tmp_path / "d.yaml")]).structure.ratios is None


@pytest.mark.parametrize("name", NAMES)
def test_printed_config_makes_the_same_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--seed", "7"]
    with pytest.raises(SystemExit) as stopped:
        parse([*argv, "--print_config"])
    assert stopped.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(["--config", str(tmp_path / "printed.yaml")]) == parse(argv)


def test_help_names_every_key_with_rule_and_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in ("structure", "optimizer", "memory", "checkpoint", "track"):
        for name in Config.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            assert f"--{section}.{name}" in text
    assert "Optimizer steps between two samplings (K): the length of a round. (a whole number > 0; default 50)" in text
    assert "[causal_lm] Sequences per optimizer step" in text
    assert "[image_classification] Images per optimizer step" in text


def test_config_is_frozen():
    config = parse(["--config", str(CONFIGS / "quickstart.yaml")])
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]


# Mistakes


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("structure.keep", "1.5", "structure.keep (1.5) must be in (0, 1] or null"),
        ("structure.keep", "0", "structure.keep (0) must be in (0, 1] or null"),
        ("structure.alpha", "1", "structure.alpha (1) must be in [0.5, 1)"),
        ("structure.groups", '{"*mlp*": 2}', "structure.groups.*mlp* (2) must be in (0, 1] or null"),
        ("structure.groups", "{}", "structure.groups ({}) must have a pattern, or nothing would be sampled"),
        (
            "structure.estimator",
            "foo",
            "structure.estimator (foo) must be one of rloo, vr_pge, disarm, credit, magnitude",
        ),
        ("structure.rules", '{"a": ["w"]}', "structure.rules.a.0 (w) must be text like tensor:axis[:block[:offset]]"),
        ("steps", "0", "steps (0) must be a whole number > 0"),
        ("steps", "many", "steps (many) must be a whole number > 0"),
        ("sync_every", "-1", "sync_every (-1) must be a whole number > 0"),
        ("sync_every", "2.5", "sync_every (2.5) must be a whole number > 0"),
        ("optimizer.lr", "0", "optimizer.lr (0) must be a number > 0"),
        ("optimizer.lr", ".inf", "optimizer.lr (inf) must be a finite number"),
        ("optimizer.lr", "true", "optimizer.lr (true) must be a number > 0"),
        ("optimizer.betas", "[0.9, no]", "optimizer.betas.1 (false) must be in [0, 1)"),
        ("structure.groups", '{"a": yes}', "structure.groups.a (true) must be in (0, 1] or null"),
        ("steps", "yes", "steps (true) must be a whole number > 0"),
        ("task.limit", "true", "task.limit (true) must be a whole number > 0 or null"),
        ("optimizer.betas", "[0.9]", "optimizer.betas.1 is missing: it must be in [0, 1)"),
        ("optimizer.betas", "[0.9, 1]", "optimizer.betas.1 (1) must be in [0, 1)"),
        ("memory.compile", "maybe", "memory.compile (maybe) must be true or false"),
        ("track.trackers", "wandb", "track.trackers (wandb) must be a list (each text)"),
        ("task.model", "vgg", "task.model (vgg) must be one of vgg19_bn, resnet32, wrn28_10, resnet50"),
        ("task.kind", "vgg", "task.kind (vgg) must be one of causal_lm, image_classification, custom"),
    ],
)
def test_wrong_value_is_named_with_its_rule(option: str, value: str, line: str, tmp_path: Path):
    assert complaint("--config", write(tmp_path / "c.yaml"), f"--{option}", value) == line
    section, _, name = option.rpartition(".")
    base = {"task": IMAGES, "optimizer": {"lr": 0.1}}.get(section, {})
    tree = {section: {**base, name: yaml.safe_load(value)}} if section else {name: yaml.safe_load(value)}
    assert complaint("--config", write(tmp_path / "d.yaml", **tree)) == line


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("structure.kep", "structure.kep is not a key: did you mean structure.keep?"),
        ("struct.keep", "struct.keep is not a key: did you mean structure.keep?"),
        ("structure.min-units", "structure.min-units is not a key: did you mean structure.min_units?"),
        ("kep", "kep is not a key: did you mean structure.keep?"),
        ("keep", "keep is not a key: did you mean structure.keep?"),
        ("lr", "lr is not a key: did you mean structure.lr or optimizer.lr?"),
        ("step", "step is not a key: did you mean steps?"),
        ("zzz", "zzz is not a key (--help lists them all)"),
    ],
)
def test_typo_is_named_with_what_may_have_been_meant(option: str, line: str, tmp_path: Path):
    assert complaint("--config", write(tmp_path / "c.yaml"), f"--{option}", "1") == line
    section, _, name = option.rpartition(".")
    tree = {section: {name: 1}} if section else {name: 1}
    assert complaint("--config", write(tmp_path / "d.yaml", **tree)) == line


def test_key_of_another_kind_of_task_is_a_mistake(tmp_path: Path):
    line = complaint("--config", write(tmp_path / "c.yaml"), "--task.sequence", "8")
    assert line.startswith("task.sequence is not a key of task.kind image_classification")
    line = complaint("--config", write(tmp_path / "d.yaml", task=TEXT), "--task.kind", "custom")
    assert line.startswith("task.batch_size is not a key of task.kind custom")


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"structure": {"schedule": "cubic"}}, "structure.schedule (cubic) needs structure.start_keep (null)"),
        ({"structure": {"start_keep": 0.5}}, "structure.start_keep (0.5) and structure.schedule_steps (0) need"),
        (
            {"structure": {"schedule": "cubic", "start_keep": 1, "schedule_steps": 101}},
            "structure.schedule_steps (101) must be <= steps (100)",
        ),
        (
            {"sync_every": 3, "structure": {"paired_batches": 4}},
            "structure.paired_batches (4) must be <= sync_every (3)",
        ),
        (
            {"memory": {"cuda_graphs": True}},
            "memory.cuda_graphs (true) needs memory.compile (false) to be true",
        ),
        (
            {"micro_batches": 2, "memory": {"cuda_graphs": True, "compile": True}},
            "memory.cuda_graphs (true) needs micro_batches (2) to be 1",
        ),
        (
            {"structure": {"sampler": "bernoulli"}, "memory": {"compile": True}},
            "memory.compile (true) needs structure.sampler (bernoulli) to be fixed",
        ),
        (
            {"structure": {"budget": "global"}, "memory": {"compile": True}},
            "memory.compile (true) needs structure.budget (global) to be per_group",
        ),
        (
            {
                "structure": {"schedule": "cubic", "start_keep": 1.0, "schedule_steps": 10},
                "memory": {"compile": True},
            },
            "memory.compile (true) needs structure.schedule (cubic) to be constant",
        ),
        ({"structure": {"keep": 0.1, "groups": {"a": 0.5}}}, "structure.keep (0.1) has no effect"),
        ({"task": TEXT | {"model": {}}}, "task.model ({}) must name its model_type"),
        ({"task": None}, "task.kind is missing: it must be one of causal_lm, image_classification, custom"),
        ({"optimizer": None}, "optimizer.lr is missing: it must be a number > 0"),
        ({"task": {"kind": "custom"}}, "task.function is missing: it must be text like package.module:function"),
        ({"task": 5}, "task (5) must be a map of keys"),
        ({"structure": [3]}, "structure ([3]) must be a map of keys"),
    ],
)
def test_broken_rule_names_all_keys_and_values(tree: dict[str, object], line: str, tmp_path: Path):
    assert complaint("--config", write(tmp_path / "c.yaml", **tree)).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 3\n task: [3\n", "mapping values are not allowed in this context line 2, column 6"),
        ("structure: {groups: {*mlp*: 1}}\n", "while scanning an alias"),
        ("- 3\n", "Unexpected config"),
        ("", "Unexpected config"),
        ("3: 4\n", "Key must be a string"),
        (b"\xff\xfe\x00", "codec can't decode"),
    ],
)
def test_file_that_is_no_config_is_named(text: str | bytes, line: str, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = complaint("--config", str(file))
    assert said.startswith(f"--config ({file}) must be YAML, a map of keys: ") and line in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 3\nseed: 1\nsteps: 4\n", "steps is given twice, on lines 1 and 3"),
        ("structure:\n  keep: 0.5\n  keep: 0.25\n", "structure.keep is given twice, on lines 2 and 3"),
        ("task: {arguments: {list: [{n: 1, n: 2}]}}\n", "task.arguments.list.n is given twice, on lines 1 and 1"),
    ],
)
def test_key_given_twice_is_named(text: str, line: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    assert complaint("--config", str(tmp_path / "c.yaml")) == f"--config ({tmp_path / 'c.yaml'}): {line}: keep one"


def test_a_map_named_twice_by_an_alias_is_none_given_twice(tmp_path: Path):
    file = tmp_path / "c.yaml"
    task = "task: {kind: custom, function: a.b:c, arguments: {one: &map {n: 1}, two: *map}}"
    file.write_text(f"steps: 3\noptimizer: {{lr: 1}}\n{task}\n")
    assert parse(["--config", str(file)]).task.arguments == {"one": {"n": 1}, "two": {"n": 1}}  # type: ignore[union-attr]


def test_booleans_stay_where_they_are_wanted():
    argv = "--steps 5 --optimizer.lr 1 --task.kind custom --task.function a.b:c --task.arguments.deep true"
    config = parse([*argv.split(), "--memory.compile", "true"])
    assert config.memory.compile is True and config.task.arguments == {"deep": True}  # type: ignore[union-attr]


def test_command_line_mistakes(tmp_path: Path):
    file = write(tmp_path / "c.yaml")
    assert complaint("--config", "nowhere.yaml") == "--config (nowhere.yaml) must be a file that exists"
    assert complaint("--config", str(tmp_path)) == f"--config ({tmp_path}) must be a file that exists"
    assert complaint("--config") == "--config needs the path of a YAML file"
    assert complaint("--config", file, "--steps") == "--steps needs a value"
    assert complaint("--config", file, "more").startswith("more is not a key")
    assert complaint("--config", file, "--structure", "3").startswith("structure is a section: set its keys one by one")
    assert complaint("--config", file, "--structure.groups.a.b", "1").startswith(
        "--structure.groups.a.b reaches too deep"
    )
    assert complaint() == "steps is missing: it must be a whole number > 0"


def test_mistake_is_one_line_on_stderr_and_code_2():
    """As run.py shows it, without importing what it trains with."""
    script = (
        "import sys\nfrom offload_trainer.config import parse\nfrom offload_trainer.errors import UserError\n"
        "try:\n    parse()\nexcept UserError as error:\n    print(f'error: {error}', file=sys.stderr)\n    sys.exit(2)"
    )
    argv = ["--config", str(CONFIGS / "quickstart.yaml"), "--structure.keep", "1.5"]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: structure.keep (1.5) must be in (0, 1] or null\n"
