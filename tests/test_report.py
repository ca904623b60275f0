import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import EXAMPLE, files

from prism_refactor.cli import app as door
from prism_refactor.cli import report
from prism_refactor.evaluation.page import Mark, Series, chart

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"]
WIDTHS = (360, 1200)


def open_in_chromium(path, profile):
    """(DOM after loading, console messages) of a page."""
    assert CHROMIUM, "chromium is missing; install it with: apt-get update && apt-get install -y chromium"
    options = [*QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def widths(page, folder):
    """{width: scroll width of the document} with the page in a frame of each width of WIDTHS."""
    frames = "".join(f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>' for width in WIDTHS)
    script = (
        "onload = () => document.body.dataset.widths = JSON.stringify([...document.querySelectorAll('iframe')].map("
        "f => [f.contentDocument.documentElement.clientWidth, f.contentDocument.documentElement.scrollWidth,"
        " f.contentDocument.querySelectorAll('svg').length]))"
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{script}</script>")
    dom, messages = open_in_chromium(wrapper, folder / "framed")
    found = re.search(r'data-widths="([^"]+)"', dom)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1])), messages


@pytest.fixture
def out(elastic, tmp_path):
    return shutil.copytree(elastic, tmp_path / "out")


def make(*arguments):
    return door.run(report.main.command, [*map(str, arguments), "--quiet"])


@pytest.mark.long
def test_page_in_a_browser(out, command, tmp_path):
    text = ["--num-tokens", "2000", "--max-seq-length", "128"]
    assert command("prism-eval", EXAMPLE, out, *text, "--save", "--budget", "12.5%,25%,50%", "--router", "both", "--quiet").code == 0
    # A manifest is a file like any other: nothing in it may become markup.
    manifest = json.loads((out / "prism.json").read_text())
    manifest["source"]["name"] = "<script>console.error('run')</script>"
    (out / "prism.json").write_text(json.dumps(manifest))
    assert make(out) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/.]""", page)
    assert page.count("data:image/png") == 1 + 2 * len(manifest["layers"])
    for part in ("quality", "active", "output-error", "partition", "load", "coactivation", "recipe"):
        assert f'<section id="{part}"' in page
    assert "two-level router" in page
    assert "--save" not in page
    _, messages = open_in_chromium(out / "report.html", tmp_path / "direct")
    assert messages == []
    measured, messages = widths(page, tmp_path)
    assert messages == []
    for width, (visible, needed, drawings) in zip(WIDTHS, measured, strict=True):
        assert width - 20 <= visible <= width
        assert needed <= visible, f"the page is {needed} wide in a window of {width}"
        assert drawings > 5


def test_page_without_evaluation_says_how_to_make_one(out, tmp_path, capsys):
    (out / "coactivation.safetensors").unlink()
    target = tmp_path / "page.html"
    assert make(out, "--output", target) == 0
    assert capsys.readouterr().out.strip() == str(target)
    page = target.read_text()
    assert "prism-eval MODEL_DIR OUT_DIR --save" in page
    assert "prism-eval MODEL_DIR OUT_DIR --budget" in page
    assert "no co-activation pictures" in page
    assert not (out / "report.html").exists()
    first = target.read_bytes()
    assert make(out, "--output", target) == 0
    assert target.read_bytes() == first


def test_page_of_the_profile(command, tmp_path):
    text = ["--num-samples", "8", "--max-seq-length", "64", "--tokens-per-expert", "64"]
    target = tmp_path / "profile.html"
    result = command("prism-profile", EXAMPLE, tmp_path / "stats", *text, "--html", target, "--quiet")
    assert result.code == 0, result.err
    page = target.read_text()
    for part in ("concentration", "load", "coactivation", "calibration"):
        assert f'<section id="{part}"' in page
    assert page.count("data:image/png") == 1 + 4
    shares = [float(share) for share in re.findall(r"<td>([0-9.]+)%</td>", page)]
    own, fixed = shares[::2], shares[1::2]
    assert len(own) == 4
    assert all(25 < low < high < 100 for low, high in zip(fixed, own, strict=True))
    # The folder is the one that is written without a page.
    assert command("prism-profile", EXAMPLE, tmp_path / "plain", *text, "--quiet").code == 0
    assert files(tmp_path / "stats") == files(tmp_path / "plain")
    measured, messages = widths(page, tmp_path)
    assert messages == []
    assert all(needed <= visible for visible, needed, _ in measured)
    assert command("prism-profile", EXAMPLE, tmp_path / "other", *text, "--html", tmp_path / "absent" / "page.html").code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"text": {}, "original": null, "refactored": []}'])
def test_broken_evaluation_is_one_line(out, capsys, content):
    (out / "evaluation.json").write_text(content)
    before = sorted(path.name for path in out.iterdir())
    assert make(out) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "evaluation.json" in error
    assert sorted(path.name for path in out.iterdir()) == before


def test_broken_picture_and_wrong_folder(out, tmp_path, capsys):
    (out / "coactivation.safetensors").write_bytes(b"nothing")
    assert make(out) == 3
    assert "coactivation.safetensors" in capsys.readouterr().err
    assert make(EXAMPLE) == 3
    assert make(out, "--output", tmp_path / "absent" / "page.html") == 2


def heights(svg, kind):
    """Vertical positions of a line's points, from the top."""
    line = re.search(rf'<g id="{kind}-line">.*?</g>\s*</g>', svg, re.S)[0]
    return [float(place) for place in re.findall(r'<use [^>]*\by="([-0-9.]+)"', line)]


def test_chart_puts_larger_values_higher_and_stays_inside():
    values = np.geomspace(1e-4, 0.3, 7)
    marks = [Mark(place, value, value / 2, value * 2) for place, value in enumerate(values)]
    drawn = chart([Series("a", "stock", marks), Series("empty", "other", [])], [(0, "0"), (6, "6")], "x", "y")
    assert "y (log scale)" in drawn["svg"]
    assert drawn["lines"] == [("a", "stock")]
    places = heights(drawn["svg"], "stock")
    assert len(places) == 7
    assert np.allclose(np.diff(places), places[1] - places[0], atol=0.2)
    assert places[1] < places[0]
    assert min(places) > 0
    assert max(places) < 72 * 3.0
    # Colours are the style sheet's.
    assert "var(--stock)" in drawn["svg"]
    assert "#00f0" not in drawn["svg"]
    one = chart([Series("a", "stock", [Mark(3, 0.0)])], [(3, "3")], "x", "y")
    assert "log scale" not in one["svg"]
    assert len(heights(one["svg"], "stock")) == 1
