"""Pages in a real browser: they fit a telephone, are light and dark, answer, and axe finds nothing serious in them.

Needs Chromium, and for the rules of accessibility axe-core: `npm install axe-core` in the root of the repository, or
AXE=path/to/axe.min.js. Screenshots stay where SECATEUR_SCREENSHOTS says, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.quality import accuracy_on
from secateur.report.record import TrainingPoint
from secateur.report.watch import LivePage

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE", Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"))
PAGES = ("report", "masks", "blocks", "inspect", "compare", "live")
HEAVIEST = 1_500_000  # bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.timeout(600),
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Deep(nn.Module):
    """More parts than a page has rows for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(30)]), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(0)
    labels = [torch.randint(4, (16,), generator=draws) for _ in range(number)]
    return [(torch.randn(16, 3, 8, 8, generator=draws) + y.view(-1, 1, 1, 1) / 2, y) for y in labels]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every page as a run writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pages")
    x, data = torch.zeros(2, 3, 8, 8), {"train": batches(6), "test": batches(4)}
    recover = [{"method": "finetune", "epochs": 3}]
    whole = {"target": {"sparsity": 0.4}, "measure": {"rounds": 8}, "control": "dense", "recover": recover}
    sc.prune(Residual(), x, data=data, recipe=whole).save(folder / "report")
    # Pruned while it trains: quality stands against sparsity at every pass.
    training = {"method": "gradual", "epochs": 4, "every": 1, "optimizer": {"name": "sgd", "lr": 0.05}}
    masks = {"target": {"sparsity": 0.6}, "granularity": "element", "training": training, "measure": {"latency": False}}
    sc.prune(Residual(), x, data=data, recipe=masks, checkpoint=folder / "run").save(folder / "masks")
    blocks = {"target": {"params": 0.6}, "measure": {"latency": False}}
    sc.prune(Deep(), torch.zeros(2, 8), recipe=blocks).save(folder / "blocks")
    (folder / "inspect.html").write_text(sc.inspect(Residual(), x).html(), encoding="utf-8")
    live = LivePage(folder / "live.html", "a run")
    live.step("train", [TrainingPoint(step=n, loss=2 / (n + 1), lr=0.1, quality=0.5) for n in range(30)])
    sc.compare(
        lambda seed: Residual(), batches(4), criteria=["magnitude", "taylor"], evaluate=accuracy_on(batches(4)),
        levels=(0.3, 0.6), seeds=(0, 1), probes=0, out=folder / "compare",
    )  # fmt: skip
    return {
        **{name: folder / name / "report.html" for name in ("report", "masks", "blocks")},
        "inspect": folder / "inspect.html",
        "live": folder / "live.html",
        "compare": folder / "compare" / "compare.html",
    }


HARNESS = """
<script>
  async function ask() {
    const found = {
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      wide: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
    };
    const row = document.querySelector(".network > li[data-groups] summary");
    if (row) { row.focus(); found.lit = document.querySelectorAll(".network > li.lit").length; row.blur(); }
    const shape = document.querySelector("[data-tip]");
    if (shape) {
      shape.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 9, clientY: 9 }));
      found.tip = document.querySelector(".tip").textContent === shape.getAttribute("data-tip");
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    }
    document.querySelectorAll("details").forEach(function (each) { each.open = true; });
    if (window.axe) {
      const judged = await axe.run(document);
      const bad = judged.violations.filter(function (one) { return ["serious", "critical"].includes(one.impact); });
      found.bad = bad.map((one) => one.id + ": " + one.nodes.slice(0, 3).map((n) => n.html).join(" | "));
      found.rules = judged.passes.length;
    }
    parent.postMessage(JSON.stringify(found), "*");
  }
  addEventListener("load", ask);
</script>
"""
FRAME = """
<!DOCTYPE html><body style="margin:0"><pre id="told">nothing</pre>
<script>
  addEventListener("message", function (event) { document.getElementById("told").textContent = event.data; });
</script>
<iframe src="asked.html" style="width:WIDTHpx;height:2000px;border:0"></iframe></body>
"""
WIDTHS = {"wide": 1200, "phone": 375, "dark": 1200}


def browse(*arguments: str, profile: Path) -> bytes:
    assert CHROMIUM is not None
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    return subprocess.run([CHROMIUM, *plain, *arguments], capture_output=True, timeout=120, check=True).stdout


def look(kind: str) -> list[str]:
    return ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if kind == "dark" else []


def asked(page: Path, kind: str, tmp_path: Path) -> dict[str, object]:
    """What a page says of itself in the browser, with axe beside it where there is one."""
    text = page.read_text("utf-8")
    # The page's own policy would let neither axe nor the questions run; that it holds is tested by itself.
    text = re.sub(r'<meta http-equiv="(Content-Security-Policy|refresh)"[^>]*>', "", text)
    axe = f"<script>{AXE.read_text('utf-8')}</script>" if AXE.exists() else ""
    (tmp_path / "asked.html").write_text(text.replace("</body>", axe + HARNESS + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(WIDTHS[kind])), encoding="utf-8")
    arguments = ["--virtual-time-budget=30000", "--window-size=1300,2100", "--dump-dom", frame.as_uri()]
    dom = browse(*look(kind), *arguments, profile=tmp_path / "profile").decode()
    told = re.search(r'<pre id="told">(.*?)</pre>', dom, re.S)
    assert told is not None
    return json.loads(unescape(told[1]))


def shoot(page: Path, kind: str, tmp_path: Path, name: str) -> Path:
    """A screenshot. A window is never narrower than 500 pixels, so a telephone is a frame in one."""
    kept = Path(os.environ.get("SECATEUR_SCREENSHOTS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    picture, tall = kept / f"{name}-{kind}.png", 3000
    frame = tmp_path / "shot.html"
    size = f"width:{WIDTHS[kind]}px;height:{tall}px;border:0"
    frame.write_text(f'<!DOCTYPE html><body style="margin:0"><iframe src="{page.as_uri()}" style="{size}"></iframe>')
    window = [f"--window-size={WIDTHS[kind]},{tall}", "--allow-file-access-from-files", f"--screenshot={picture}"]
    browse(*look(kind), *window, frame.as_uri(), profile=tmp_path / "profile")
    return picture


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_answers_and_is_accessible(pages: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    page = pages[name]
    assert page.stat().st_size < HEAVIEST
    found = asked(page, kind, tmp_path)
    assert found["dark"] == (kind == "dark")
    assert found["wide"] <= found["room"], "nothing runs out of the page"
    assert found.get("tip", True), "a shape under the pointer is named"
    if name in ("report", "inspect"):
        assert found["lit"] > 1, "a row that is looked at shows what hangs together with it"
    assert shoot(page, kind, tmp_path, name).stat().st_size > 20_000, "an empty page is a few kB"
    if not AXE.exists():
        pytest.skip("no axe-core here: npm install axe-core")
    assert found["rules"] > 5
    assert found["bad"] == []


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_lets_the_script_of_the_page_run_and_no_other(
    pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    copy = tmp_path / "page.html"
    text = re.sub(r'<meta http-equiv="refresh"[^>]*>', "", pages[name].read_text("utf-8"))
    stranger = "<script>document.body.className = 'stranger'</script>"
    copy.write_text(text.replace("</main>", f"{stranger}</main>"), encoding="utf-8")
    dom = browse("--virtual-time-budget=5000", "--dump-dom", copy.as_uri(), profile=tmp_path / "profile").decode()
    assert '<div class="tip"' in dom
    assert 'class="stranger"' not in dom


def test_a_report_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(f"--print-to-pdf={paper}", pages["report"].as_uri(), profile=tmp_path / "profile")
    sheets = len(re.findall(rb"/Type /Page\b", paper.read_bytes()))
    assert 1 <= sheets <= 12
