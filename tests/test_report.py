"""The page of what runs did: what it says, and how a browser shows it."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from offload_trainer import run
from tests import runs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(runs.ROOT / "tools")
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    changes = {"structure.lr": 0.1, "track.structure_every": 4, "track.eval_every": 4, "track.log_every": 2}
    assert run.main(["--config", str(runs.config(folder, **changes)), "--track.display", "plain"]) == 0
    return folder / "out"


def test_a_log_pictures_s_widths_and_coverage(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    pictured = [record for record in records if "structure" in record]
    assert [record["step"] for record in pictured] == [4, 8, 12]
    for record in pictured:
        for group in record["structure"].values():
            assert len(group["s"]) == len(group["trained"]) == len(group["age"]) == min(64, group["units"])
            assert 0 < group["width"] < group["units"]
            assert all(0 <= value <= 1 for value in group["s"] + group["trained"])
            assert min(group["age"]) == 0 and max(group["age"]) <= record["step"]
    for group in pictured[0]["structure"].values():  # one round: its units were trained in all steps, others in none
        assert set(group["trained"]) == {0, 1} and sum(group["trained"]) == group["width"]
        assert [age == 0 for age in group["age"]] == [share == 1 for share in group["trained"]]


def test_a_page_holds_all_of_a_run_and_nothing_from_elsewhere(finished: Path, report: Any, capsys: Any) -> None:
    assert report.main([str(finished)]) == 0
    page = (finished / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    for word in ("training loss", "structure", "transfers", "memory", "s over time", "measured ÷ predicted"):
        assert word in page
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_runs_are_compared_and_an_unfinished_one_is_shown(finished: Path, report: Any, tmp_path: Path) -> None:
    going = tmp_path / "still <going>"
    going.mkdir()
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (going / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    file = tmp_path / "both.html"
    assert report.main([str(finished), str(going), "--html", str(file)]) == 0
    page = file.read_text()
    assert "(not finished)" in page and "The run has not finished" in page
    assert "still &lt;going&gt;" in page and "still <going>" not in page


def test_a_metric_that_is_no_number_and_a_damaged_summary(
    finished: Path, report: Any, tmp_path: Path, capsys: Any
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(finished, odd)
    summary = json.loads((odd / "summary.json").read_text())
    summary["exported"]["precision"] = None
    (odd / "summary.json").write_text(json.dumps(summary))
    assert report.main([str(odd)]) == 0 and "precision –" in (odd / "report.html").read_text()
    for content, said in (
        ("[]", "summary.json cannot be read"),
        ('{"exported": {}}', "damaged"),
        ("{", "summary.json"),
    ):
        capsys.readouterr()
        (odd / "summary.json").write_text(content)
        assert report.main([str(odd)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", "{broken\n", "[1]\n", '{"loss": 1}\n'])
def test_a_folder_without_metrics_is_named(tmp_path: Path, report: Any, capsys: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: {tmp_path / 'metrics.jsonl'}") and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_it(finished: Path, report: Any, tmp_path: Path) -> None:
    """Every picture has a size, nothing is wider than the window, and the page loads without an error."""
    page = tmp_path / "page.html"
    assert report.main([str(finished), "--html", str(page)]) == 0
    probe = """<script>addEventListener("load", () => {
        const boxes = [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect());
        document.title = JSON.stringify({pictures: boxes.filter(b => b.width > 100 && b.height > 100).length,
            wide: document.documentElement.scrollWidth > innerWidth, headings: document.querySelectorAll("h2").length});
    })</script>"""
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    assert json.loads(title[1].replace("&quot;", '"')) == {"pictures": 4, "wide": False, "headings": 3}
