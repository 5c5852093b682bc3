"""The report as a page and its pictures: what they say, and that nothing in a model can escape."""

import dataclasses
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.report import RegionReport, Report, Tiles
from fa3_compile.report_tiles import COLOURS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CAUSAL = Tiles(6, 4, 6, block=128, picture=("+...", "#+..", "##+.", "###+"))
FUSED = RegionReport(
    index=0,
    graph="0/0",
    fused=True,
    where="model.py:7: softmax",
    form="causal",
    score="0.25*s",
    mask="kv <= q",
    tiles=CAUSAL,
    kernel="cuda_sm90",
    config="128 x 112",
    gradients="triton",
    spec="attention(score=0.25*s, mask=kv <= q)",
)
LEFT = RegionReport(1, "0/0", False, stage="check", code="weights-used", reason="why", hint="do")
HOSTILE = [
    '<script>document.title = "pwned"</script>',
    "<img src=x onerror=\"document.title='pwned'\">",
    "</style></title></svg><b>bold</b>",
    "'\" onload='x' &lt;b&gt; {{ 7 * 7 }}",
    "--><iframe src='javascript:1'>",
]


class Page(HTMLParser):
    """The elements of a page and its text; void and closed elements are balanced."""

    VOID = {"meta", "path", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.said = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


def test_the_page_says_what_the_text_says_once_for_regions_that_are_alike():
    report = Report(
        [FUSED, dataclasses.replace(FUSED, index=1), LEFT],
        graphs=1,
        graph_breaks=["print"],
        notes=["a note"],
        milliseconds={"eager": 3.25},
    )
    page = Page(report.to_html())
    assert page.count("section") == 2
    for said in (report.summary(), "0 (graph 0/0), 1 (graph 0/0)", "kv <= q", "cuda_sm90 128 x 112",
                 "triton", "6 skipped, 4 masked, 6 full, of 16", "why [weights-used]",
                 "do", "print", "a note", "3.250", FUSED.spec):  # fmt: skip
        assert said in page.text, said
    assert page.count("svg") == 1


def test_the_page_needs_nothing_from_elsewhere():
    page = Page(Report([FUSED], graphs=1).to_html())
    policy = next(a["content"] for _, a in page.elements if "content-security" in str(a).lower())
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.elements)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RegionReport) if f.type == "str"])  # fmt: skip
def test_hostile_texts_stay_texts(text, name):
    region = dataclasses.replace(FUSED, **{name: text})
    expected = [tag for tag, _ in Page(Report([FUSED], graphs=1).to_html()).elements]
    report = Report([region], graphs=1)
    page = Page(report.to_html())
    # One row more or fewer, if the field is empty in FUSED; never another kind of element.
    assert {tag for tag, _ in page.elements} <= set(expected) | {"code"}
    # Rows of a declined region are not shown of a fused one, except for what rows() gives.
    if name not in ("stage", "code"):
        assert text in page.text
    ElementTree.fromstring(report.plot_tiles().svg())


def test_hostile_lines_beside_the_regions_stay_texts():
    lines = list(HOSTILE)
    report = Report([], graphs=1, graph_breaks=lines, notes=lines, milliseconds={lines[0]: 1.0})
    page = Page(report.to_html())
    assert page.count("script") == page.count("img") == page.count("iframe") == 0
    assert all(page.text.count(line) == 2 for line in lines[1:])


def test_to_html_writes_the_file(tmp_path):
    report = Report([FUSED], graphs=1)
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text


def test_the_picture_has_a_square_a_tile():
    picture = Report([FUSED, FUSED, LEFT]).plot_tiles()
    assert len(picture.masks) == 1
    root = ElementTree.fromstring(picture.svg())
    paths = [e for e in root.iter() if e.tag.endswith("path")]
    areas = {path.get("fill"): sum(_areas(path.get("d"))) for path in paths}
    # 192 pixels a side: a tile is 48 x 48.
    assert {c: round(a / 48**2) for c, a in areas.items()} == dict(zip(COLOURS.values(), (6, 4, 6)))
    assert "###+" in str(picture)
    assert picture._repr_svg_() == picture.svg()


def _areas(path: str):
    for part in path.split("M")[1:]:
        width, rest = part.split("h", 1)[1].split("v", 1)
        yield float(width) * float(rest.split("H", 1)[0])


def test_without_a_known_mask_there_is_no_picture():
    unknown = dataclasses.replace(FUSED, tiles=Tiles(reason="known when it runs"))
    report = Report([unknown], graphs=1)
    assert str(report.plot_tiles()) == "no mask is known before it runs"
    assert "<svg" not in report.to_html()


def attention(q, k, v):
    at = torch.arange(q.shape[-2])
    far = (at[:, None] - at[None, :] >= 64) | (at[:, None] < at[None, :])
    return (q @ k.transpose(-2, -1)).masked_fill(far, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("length, block, side", [(24, 2, 12), (1024, 128, 8), (16384, 256, 64)])
def test_the_picture_of_a_model_is_drawn_in_tiles_that_can_be_seen(length, block, side):
    from fa3_compile import selection
    from fa3_compile.spec.attention import AttentionSpec
    from fa3_compile.spec.tiles import tile_map

    assert selection._drawn_block(length) == block
    spec = AttentionSpec.parse("attention(score=s, mask=(kv <= q) & (q - kv < 64), dead=nan)")
    assert tile_map(spec, length, length, block, block).shape == (side, side)


def test_a_report_of_a_real_model_has_its_picture():
    q = torch.randn(1, 1, 256, 8)
    report = explain_with(rewritten, attention, (q, q, q), {}, None, None)
    tiles = report.regions[0].tiles
    assert (tiles.block, len(tiles.picture)) == (32, 8)
    assert tiles.picture[0] == "+......."
    assert tiles.picture[3] == ".+#+...."


@pytest.fixture
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")

    def run(*words: str) -> str:
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_browser_shows_the_tiles_in_their_colours(browser, tmp_path):
    image = pytest.importorskip("PIL.Image")
    Report([FUSED, LEFT], graphs=1).to_html(tmp_path / "report.html")
    shot = tmp_path / "report.png"
    browser(f"--screenshot={shot}", "--window-size=1000,700", (tmp_path / "report.html").as_uri())
    colours = image.open(shot).convert("RGB").getcolors(2**20)
    seen = {f"#{r:02x}{g:02x}{b:02x}": number for number, (r, g, b) in colours}
    tile = 48 * 48
    for colour, number in zip(COLOURS.values(), (6, 4, 6)):
        # The legend's keys add a little to each.
        assert number * tile <= seen[colour] <= number * tile + 400, colour


def test_a_browser_runs_nothing_that_a_model_is_called(browser, tmp_path):
    region = dataclasses.replace(FUSED, where=HOSTILE[0], form=HOSTILE[1], node=HOSTILE[4])
    report = Report([region], graphs=1, notes=HOSTILE)
    report.to_html(tmp_path / "report.html")
    dom = browser("--dump-dom", (tmp_path / "report.html").as_uri())
    assert f"<title>{report.summary()}</title>" in dom
    assert "<script" not in dom and "<img" not in dom and "<iframe" not in dom
