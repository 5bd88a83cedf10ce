"""What the README and the pages of docs/ say, run: their Python, their commands, their links, their figures.

Every Python block of a page runs, in order and in one namespace, with small budgets; marked slow, also as it stands.
Commands are read by the command line's own parser, and where the page shows an error message, it is the real one.
"""

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

import gibbsian
from gibbsian import Model, cli
from gibbsian.commands.protein import PROTEIN_COMMANDS
from gibbsian.recipes import defaults

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BUDGET = {"steps": 40, "warmup": 10, "chains": 64, "temperatures": 20, "points": 200, "limit": 300}
COMMANDS = ("train", "sample", "score", "compose", "evaluate", "report", "datasets")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The fenced blocks of a language, each behind as many empty lines as lead to it, so that tracebacks tell."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in FENCE.finditer(text) if match[1] == language]


def pages_with(language):
    found = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.stem)


def cut(source):
    """Lower the numbers that cost time: keyword arguments, and how many rows chains start from."""
    source = re.sub(r"\[:(\d+)\]", lambda m: f"[:{min(64, int(m[1]))}]", source)
    return re.sub(rf"\b({'|'.join(BUDGET)})=(\d[\d_]*)", lambda m: f"{m[1]}={min(BUDGET[m[1]], int(m[2]))}", source)


def run_python(page, change=lambda source: source):
    names = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + change(source), page, "exec"), names)


@pytest.fixture
def hurried(monkeypatch):
    """Recipes that train for a few steps only."""
    chosen = defaults._defaults

    def few_steps(*arguments):
        recipe, training = chosen(*arguments)
        return recipe, training | {"steps": BUDGET["steps"]}

    monkeypatch.setattr(defaults, "_defaults", few_steps)


@pages_with("python")
@pytest.mark.filterwarnings("ignore:The .* are dominated by a few:RuntimeWarning")
def test_python_blocks_run_on_a_small_budget(page, tmp_path, monkeypatch, hurried):
    monkeypatch.chdir(tmp_path)
    run_python(page, cut)


@pytest.mark.slow
@pages_with("python")
def test_python_blocks_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(page)


def commands(page):
    """Each ``$ gibbsian ...`` line of a page, under torchrun or not, with the output printed under it."""
    found = []
    for _, source in blocks(page, "console"):
        for part in re.split(r"^\$ ", source, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            words = shlex.split(line, comments=True)
            if "gibbsian" in words[:1] or "torchrun" in words[:1]:
                found.append((words[words.index("gibbsian") + 1 :], output.strip()))
    return found


def plain(text):
    return " ".join(text.split())


@pages_with("console")
def test_commands_are_understood(page, monkeypatch, capsys):
    called = []

    def stand_in_for(name, real):
        return functools.wraps(real)(lambda *arguments, **options: called.append(name))

    for name in COMMANDS:
        monkeypatch.setattr(cli, name, stand_in_for(name, getattr(cli, name)))
    planned = cli.plan_command
    monkeypatch.setattr(cli, "plan_command", lambda overrides: stand_in_for("plan", planned(overrides)))
    for name, real in PROTEIN_COMMANDS.items():
        monkeypatch.setitem(PROTEIN_COMMANDS, name, stand_in_for(f"protein {name}", real))
    for arguments, _ in commands(page):
        if "--help" in arguments:
            continue
        try:
            cli.main(arguments)
        except SystemExit as stopped:
            pytest.fail(f"gibbsian {shlex.join(arguments)} ended with {stopped.code}: {capsys.readouterr()}")
        assert called.pop() == " ".join(arguments[: 2 if arguments[0] == "protein" else 1])


@pages_with("console")
def test_errors_are_shown_as_they_are(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, output in commands(page):
        if not output.startswith("error:"):
            continue
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 1
        assert plain(output) in plain(capsys.readouterr().err)


@pytest.mark.slow
def test_the_readmes_commands_run_on_a_small_budget(tmp_path, monkeypatch, capsys, hurried):
    monkeypatch.chdir(tmp_path)
    real = Model.log_z
    monkeypatch.setattr(Model, "log_z", lambda self, rng: real(self, rng, BUDGET["temperatures"]))
    ran = []
    for arguments, output in commands(ROOT / "README.md"):
        if not output.startswith("error:") and "measurements.csv" not in arguments:
            cli.main(arguments)
            ran.append(arguments[0])
    assert {"train", "sample", "score"} <= set(ran)
    assert (tmp_path / "runs" / "digits" / "report.html").stat().st_size > 10_000


def test_the_first_screen_holds_the_two_commands_that_set_everything_up():
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24]
    assert "pip install . && gibbsian train digits" in first
    assert "pip install '.[test]' && pytest" in first


@every_page
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    missing = [
        t for t in targets if "://" not in t and t[0] != "#" and not (page.parent / t.partition("#")[0]).exists()
    ]
    assert missing == []


def names_said(page):
    """What a page calls ``gb.name`` in running text."""
    return set(re.findall(r"`gb\.(\w+)", FENCE.sub("", page.read_text(encoding="utf-8"))))


@every_page
def test_names_in_running_text_exist(page):
    assert names_said(page) - {*gibbsian.__all__, "__version__"} == set()


def test_options_in_running_text_exist():
    text = FENCE.sub("", (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8"))
    fields = {f.replace("_", "-") for f in cli.override_class().__dataclass_fields__}
    fields |= {f.replace("_", "-") for f in cli.DataOptions.__dataclass_fields__}
    own = {"out", "seed", "resume", "overwrite", "no-evaluation", "n", "help", "model"}
    own |= {"reference", "false-positive-rate", "confidence", "by"}  # of score
    own |= {"label", "guidance", "corrected"}  # of sample; the first of score, too
    own |= {"particles", "weights"}  # of compose
    said = set(re.findall(r"`--([a-z-]+)", text))
    assert said <= fields | own
    assert {"objective", "steps", "labels", "resume"} <= said


FIGURES = re.compile(r"<!-- figures: (\S+) -->(.*?)<!-- end of figures -->", re.DOTALL)


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def unsupported(text, numbers):
    """Decimals of a text that no number rounds to."""
    said = re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.])", text.replace("−", "-"))
    return [s for s in said if not any(abs(n - float(s)) <= 0.5001 * 10 ** -len(s.split(".")[1]) for n in numbers)]


@every_page
def test_measured_figures_are_those_of_the_benchmarks(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- figures:") == len(FIGURES.findall(text))
    for path, said in FIGURES.findall(text):
        numbers = numbers_in(json.loads((ROOT / path).read_text(encoding="utf-8")))
        assert unsupported(said, numbers) == [], path


def test_an_invented_figure_is_seen():
    assert unsupported("1.92 ± 0.07, 3 seeds", [1.9166, 0.0712]) == []
    assert unsupported("1.92 ± 0.07 and 2.5", [1.9166, 0.0712]) == ["2.5"]
