"""The report as a file: self-contained, escaped, complete, honest about what is not finite, and never half-written."""

import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from gibbsian.diagnostics.estimate import Estimate
from gibbsian.errors import OptionError, ShapeError, StorageError
from gibbsian.report import (
    ChainSummary,
    LikelihoodSummary,
    LogZSummary,
    QualityTable,
    ReportContent,
    write_report,
)
from gibbsian.report.content import FLOOR
from gibbsian.report.headline import headline
from gibbsian.report.page import duration, render

ALL = ["samples", "learning", "energies", "chains", "logz", "quality", "detection", "reproduce"]


class Page(HTMLParser):
    """Tags with attributes, and the visible text."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words).replace("\N{NARROW NO-BREAK SPACE}", " "))

    def sections(self):
        return [a["id"] for t, a in self.tags if t == "section"]


def read(content):
    page = Page(render(content))
    assert not page.open  # every tag is closed
    return page


def run(steps=40):
    return [
        {"step": 10 * i, "loss": 0.1 * i, "energy_data": -1.0, "energy_samples": -1.1, "grad_norm": 2.0**-i}
        for i in range(steps)
    ]


@pytest.fixture(scope="module")
def full():
    rng = np.random.default_rng(0)
    grid = np.linspace(-2, 2, 12)
    energy = (grid[None, :] ** 2 + grid[:, None] ** 2) / 2
    return ReportContent(
        title="Two moons",
        data_name="two-moons",
        event_shape=(2,),
        columns=["left", "right"],
        recipe={"kernel": {"step_size": 0.02}, "objective": "pcd"},
        command="gibbsian train two-moons",
        versions={"torch": "2.13.0"},
        seed=7,
        seconds=192.4,
        train=rng.normal(size=(60, 2)),
        held_out=rng.normal(size=(20, 2)),
        samples=rng.normal(size=(50, 2)),
        other_samples={"unadjusted": rng.normal(size=(50, 2))},
        metrics=run(),
        events=[{"step": 100, "kind": "gap", "action": "rollback", "values": {"gap": 12.5}}],
        energies={"training": rng.normal(size=60), "noise": rng.normal(size=60) + 500},
        energy_map=(grid, grid, energy),
        true_density=np.exp(-energy),
        chains=ChainSummary(rng.normal(size=(30, 5)), rng.uniform(0.5, 0.7, 5), 1.004, 812.0, "MALA(0.02)", 3),
        log_z=LogZSummary(-1.234, 0.021, -1.29, -1.15, 412.0, "AIS", "Ninety-five per cent bounds.", exact=-1.24),
        log_likelihood=LikelihoodSummary((-1.41, 0.013), Estimate(-1.43, 0.027), bits_per_dimension=(1.03, 0.02)),
        quality=QualityTable(
            {
                "samples": {"energy distance": (0.0021, 0.0011), "accuracy": (0.52, 0.01)},
                FLOOR: {"energy distance": (0.0009, 0.0008), "accuracy": (0.50, 0.01)},
                "Gaussian fit": {"energy distance": (0.081, 0.004), "accuracy": 0.87},
            },
            better={"accuracy": 0.5},
        ),
        detection={"uniform noise": {"AUROC": (0.981, 0.003)}},
        notes=["Chains were short."],
    )


@pytest.fixture(scope="module")
def page(full):
    return read(full)


def test_the_page_fetches_nothing(full, page):
    assert page.sections() == ALL
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            address = attributes.get(name, "#")
            assert address.startswith(("#", "data:")), (tag, address)
    style = re.findall(r"<style>(.*?)</style>", render(full), re.DOTALL)[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_picture_has_words_and_every_id_is_unique(page):
    for tag, attributes in page.tags:
        if tag == "svg":
            assert len(attributes["aria-label"]) > 10
        if tag == "img":
            assert len(attributes["alt"]) > 10
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert links <= set(ids)


def test_numbers_are_shown_with_their_errors(page):
    for number in (
        "−1.234 ± 0.021",
        "−1.430 ± 0.027",
        "−1.410 ± 0.013",
        "0.0021 ± 0.0011",
        "0.00090 ± 0.00080",
        "0.9810 ± 0.0030",
        "1.030 ± 0.020",
        "0.87 ± ?",
    ):
        assert number in page.text
    assert "Between −1.29 and −1.15" in page.text


def test_the_verdicts_follow_the_numbers():
    def says(**content):
        return Page(headline(ReportContent(**content))).text

    assert "no sign of overfitting" in says(log_likelihood=LikelihoodSummary((-1.41, 0.013), (-1.43, 0.027)))
    assert "Training is higher by 2.000 ± 0.051" in says(log_likelihood=LikelihoodSummary((1.0, 0.05), (-1.0, 0.01)))
    assert "The bounds cross" in says(log_z=LogZSummary(0.0, 0.1, 1.0, -1.0))
    assert "One-sided" in says(log_z=LogZSummary(0.0, 0.1, -1.0, math.inf))
    assert "1 rollback" in says(events=[{"step": 100, "kind": "gap", "action": "rollback"}])
    assert "no rollbacks" in says(events=[])
    assert "not watched" in says(metrics=run(2))
    assert "Chains disagree" in says(chains=ChainSummary(r_hat=np.array([1.0, 1.3])))
    worse = {"samples": {"d": (0.2, 0.01)}, FLOOR: {"d": (0.0, 0.01)}, "Gaussian fit": {"d": (0.1, 0.01)}}
    assert "every baseline does better" in says(quality=QualityTable(worse))
    assert "baseline does better" not in says(quality=QualityTable(worse, better={"d": "higher"}))
    assert "a baseline does better" in says(quality=QualityTable({**worse, "copies": {"d": (0.3, 0.01)}}))


def test_a_likelihood_stands_on_log_z():
    likelihood = LikelihoodSummary((-1.41, 0.013), (-1.43, 0.027))
    for z, said in ((LogZSummary(0.0, 0.1, 1.0, -1.0), True), (LogZSummary(0.0, 0.1, -1.0, 1.0), False)):
        cards = Page(headline(ReportContent(log_likelihood=likelihood, log_z=z))).text
        assert ("only as good as log Z" in cards) is said
        assert ("no sign of overfitting" in cards) is not said


@pytest.mark.parametrize(("gap", "said"), [(-59.7, "59.7 nats above the data"), (30.0, "30 nats below"), (-5.0, "")])
def test_chains_far_from_the_data_are_told_of(gap, said):
    metrics = [{"step": 10 * i, "loss": 0.0, "gap": 1.0 if i < 15 else gap} for i in range(1, 21)]
    energies = {"training": np.random.default_rng(0).normal(size=1000) * 10.0}
    cards = Page(headline(ReportContent(metrics=metrics, energies=energies, events=[]))).text
    assert said in cards
    assert ("do not stand for the model" in cards) is bool(said)


def test_sections_disappear_with_their_content():
    empty = read(ReportContent())
    assert empty.sections() == []
    assert "Nothing was measured" in empty.text
    assert not [t for t, _ in empty.tags if t in ("svg", "img", "figure", "table")]
    for name, part in (
        ("learning", {"metrics": run(3)}),
        ("chains", {"chains": ChainSummary(kernel="HMC")}),
        ("logz", {"log_z": LogZSummary(0.0, 0.1, -1.0, 1.0)}),
        ("reproduce", {"seed": 3}),
        ("detection", {"detection": {"noise": {"AUROC": 0.5}}}),
    ):
        assert read(ReportContent(**part)).sections() == [name]


def test_names_are_escaped():
    evil = '<img src=x onerror="alert(1)">&$^$数'
    rng = np.random.default_rng(0)
    content = ReportContent(
        title=evil,
        data_name=evil,
        columns=[evil, "b", "c"],
        command=evil,
        recipe={evil: {evil: evil}},
        versions={evil: evil},
        train=rng.normal(size=(60, 3)),
        samples=rng.normal(size=(60, 3)),
        other_samples={evil: rng.normal(size=(60, 3))},
        metrics=[{"step": 0, "loss": 1.0, evil: 2.0}],
        events=[{"step": 0, "kind": evil, "action": evil, "values": {evil: evil}}],
        energies={evil: rng.normal(size=20)},
        chains=ChainSummary(kernel=evil),
        log_z=LogZSummary(0.0, 0.1, -1.0, 1.0, method=evil, note=evil),
        log_likelihood=LikelihoodSummary(0.0, 0.0, unit=evil),
        quality=QualityTable({evil: {evil: 0.1}}),
        detection={evil: {evil: 0.1}},
        notes=[evil],
    )
    page = read(content)
    assert not [a for t, a in page.tags if t == "img"]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count(evil) > 15


def test_what_is_not_finite_is_said_and_left_as_a_gap():
    metrics = run(30)
    metrics[4]["loss"] = math.nan
    metrics[5]["loss"] = "Infinity"  # as metrics.jsonl writes it
    metrics[9]["grad_norm"] = -math.inf
    samples = np.random.default_rng(0).normal(size=(40, 2))
    samples[:3] = math.nan
    page = read(
        ReportContent(
            metrics=metrics,
            samples=samples,
            energies={"samples": np.array([1.0, 2.0, math.nan])},
            log_z=LogZSummary(math.nan, math.nan, -math.inf, 3.0),
            chains=ChainSummary(energy_trace=np.full((9, 2), math.nan), r_hat=np.array([math.nan, 1.0])),
        )
    )
    assert "2 values are not finite" in page.text
    assert "1 values are not finite" in page.text
    assert "3 logged values are not finite" in page.text
    assert "3 of 40 rows of samples are not finite" in page.text
    assert "1 of 3 energies of samples are not finite" in page.text
    assert "1 of 2 coordinates never move" in page.text


def test_the_trainers_own_events_among_the_metrics_are_events():
    rollback = {"step": 55, "event": "rollback", "kind": "gap", "metric": "gap", "value": 99.0, "to_step": 30}
    page = read(ReportContent(metrics=[*run(6), rollback, *run(3)]))
    assert "1 rollback" in page.text
    assert "metric gap, value 99, to_step 30" in page.text
    assert "to step over the steps" not in str(page.tags)


def test_images_of_every_layout_are_shown():
    rng = np.random.default_rng(0)
    for shape in ((8, 8), (1, 8, 8), (3, 8, 8), (8, 8, 3), (64,)):
        content = ReportContent(kind="image", event_shape=shape, train=rng.uniform(size=(9, *shape)))
        assert [t for t, _ in read(content).tags].count("img") == 1
    both = ReportContent(kind="image", train=rng.uniform(size=(9, 8, 8)), samples=rng.uniform(size=(4, 64)))
    assert "nearest training images" in read(both).text


def test_an_old_report_survives_every_failure(tmp_path, monkeypatch):
    path = write_report(tmp_path / "sub" / "report.html", ReportContent(title="old"))
    old = path.read_text()
    assert "old" in old

    def broken(content):
        raise RuntimeError("a figure fails")

    with monkeypatch.context() as patch:
        patch.setattr("gibbsian.report.page._SECTIONS", (("samples", "Samples", broken),))
        with pytest.raises(RuntimeError):
            write_report(path, ReportContent(title="new"))

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("gibbsian.report.page.os.replace", full_disk)
        with pytest.raises(StorageError, match="no space left"):
            write_report(path, ReportContent(title="new"))
    assert path.read_text() == old
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(StorageError):
        write_report(path / "below-a-file" / "r.html", ReportContent())


def test_matplotlib_settings_and_pyplot_are_left_alone(full):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.color": "red", "font.size": 30}):
        styled = render(full)
    assert dict(matplotlib.rcParams) == before

    def without_time(page):
        return re.sub(r"<footer>.*?</footer>", "", page)

    assert without_time(styled) == without_time(render(full))


def test_refusals_name_the_numbers():
    with pytest.raises(OptionError, match="sound"):
        ReportContent(kind="sound")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one shape"):
        ReportContent(train=np.zeros((3, 2)), samples=np.zeros((3, 4)))
    with pytest.raises(ShapeError, match="true_density needs shape \\(4, 5\\)"):
        ReportContent(energy_map=(np.arange(5), np.arange(4), np.zeros((4, 5))), true_density=np.zeros((5, 4)))


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (2.34, 42, 192.4, 7500)] == ["2.3 s", "42 s", "3 min 12 s", "2 h 5 min"]
