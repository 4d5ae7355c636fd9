"""The pages of a report in headless Chromium: what a person sees, clicks and is safe from.

What these tests catch: an error in the page's script, anything asked of the network, a filter, a page or a search that
shows other prompts than it says, a difference between draft and refinement that is not one, and model text that is
taken for markup, a link or a terminal's escapes; a plot that names another value than that of the step under the
pointer.
"""

import importlib
import itertools
import json
import random
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import chromium
import pytest

from igrpo_jax.report import figures, pages, runs, samples

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
report_scale = importlib.import_module("report_scale")

pytestmark = pytest.mark.skipif(
    chromium.browser() is None, reason="no Chromium (apt-get install chromium, or the extra pages)"
)

STEPS, PROMPTS = 79, 16  # with 4 drafts and 4 refinements each 10,112 samples
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "</style><style>body { display: none }</style><img src=x onerror='window.hacked = 1'>",
    "<a href='javascript:window.hacked = 1' onclick='window.hacked = 1'>link</a> javascript:window.hacked=1",
    "\x1b]0;title\x07\x1b[31mred\x1b[0m \u202egnp.exe \x00",
    "lone \ud800 surrogate, {{ 7 * 7 }} ${7 * 7} `${window.hacked = 1}` __proto__ \\u003cscript\\u003e",
    "A" * 1_000_000,
    "$$\\frac{a}{b}$$ \\href{javascript:window.hacked=1}{x} \\(x^2\\)",
)


def write_hostile_step(folder, step):
    """A step in which every text is hostile, in bytes that are not all UTF-8."""
    lines = []
    for place, text in enumerate(HOSTILE):
        row = dict.fromkeys(("prompt_id", "prompt", "text", "answer", "extracted", "status"), text)
        row |= {"finished": True, "token_count": 3, "rewards": {"accuracy": 1.0, text[:80]: 1.0}, "reward": 2.0}
        draft = {"stage": "draft", "sample_id": 0, "parent_draft_id": None, "advantage": None}
        done = {"stage": "refine", "sample_id": place, "parent_draft_id": 0, "advantage": 0.5, "text": f"other {text}"}
        lines += [json.dumps(row | draft), json.dumps(row | done)]
    data = "\n".join(lines).encode() + b"\n"
    assert b'"link' not in data and b"link" in data
    (folder / "samples" / f"step_{step:06d}.jsonl").write_bytes(data.replace(b"link", b"li\xffnk"))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": 0.0, "eval/<img src=x onerror=alert(1)>/pass@1": 0.5}) + "\n")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = folder / "<b>run<b>"
    report_scale.write_run(run, STEPS, PROMPTS, words=40, evaluate=20)
    write_hostile_step(run, STEPS + 1)
    pages.build([run], folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def page(browser, out):
    """The browser, on nothing yet; at the end nothing may have gone wrong or out."""
    browser.errors.clear()
    browser.requests.clear()
    browser.call("Emulation.setScriptExecutionDisabled", value=False)  # as a test that failed may have left it
    browser.look(1280, 900)
    browser.open("about:blank")
    yield browser
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith((out.as_uri() + "/", "data:,", "about:"))] == []


SETTLED = "document.readyState === 'complete' && document.body.dataset.shown == turn"


def open_samples(page, out, view=""):
    page.open("about:blank")  # with another fragment alone it would stay where it is
    page.open((out / "samples.html").as_uri() + view)
    page.wait(f"location.href !== 'about:blank' && {SETTLED}")


def act(page, script):
    page.run(script)
    page.wait(SETTLED)


def click(page, selector):
    act(page, f"document.querySelector({json.dumps(selector)}).click()")


def heads(page):
    return page.run("[...document.querySelectorAll('.prompt > header > b')].map(b => b.textContent)")


def count(page):
    return page.run("document.getElementById('count').textContent")


def test_the_report_opens(page, out, tmp_path):
    for width, dark in ((1280, False), (390, True)):  # without the script there are the PNGs
        page.look(width, 900, dark)
        page.open("about:blank")
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open((out / "index.html").as_uri())
        # The browser may choose the light image first, and the dark one once it knows of the wish.
        chosen = f"one.complete && one.naturalWidth && one.currentSrc.endsWith('.dark.png') === {json.dumps(dark)}"
        page.wait(f"document.images.length && [...document.images].every(one => {chosen})")
        assert page.run("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 20_000
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    open_report(page, out)
    assert "<b>run<b>" in page.run("document.title") and page.run("document.querySelector('b b')") is None
    assert "<img src=x onerror=alert(1)> only" in page.run("document.body.innerText")
    # What it links to is the last step, hostile as it is: its copies of the draft.
    page.run("document.querySelector('.links a[href*=\"flags=copied\"]').click()")
    page.wait(f"location.pathname.endsWith('samples.html') && {SETTLED}")
    assert page.run("view.flags") == ["copied"] and heads(page)[0].startswith(f"step {STEPS + 1} ·")


def test_names_of_settings_are_not_broken_within_a_word(page, out):
    page.look(390, 900)
    open_report(page, out)
    page.run("document.querySelector('details.settings').open = true")
    page.run(
        "lines = th => { const range = document.createRange(); range.selectNodeContents(th); "
        "return new Set([...range.getClientRects()].map(line => line.top)).size }"
    )
    names = page.run("[...document.querySelectorAll('.settings tbody th')].map(th => [th.textContent, lines(th)])")
    assert max(rows for _, rows in names) > 1  # the page is narrow enough for this to say something
    assert [name for name, rows in names if rows > name.count(".") + 1] == []


def test_of_ten_thousand_samples_a_page_loads_a_step(page, out):
    open_samples(page, out, "#run=0&step=79")
    there = page.run("steps().reduce((sum, step) => sum + step.flags.length, 0)")
    assert there == STEPS * PROMPTS + len(HOSTILE) and there * 8 > 10_000
    assert len(heads(page)) == 6
    # Not the data of every step: how long that takes is in benchmarks/report_scale.py.
    asked = [Path(unquote(urlparse(url).path)) for url in page.requests if url.startswith("file:")]
    whole = sum(path.stat().st_size for path in out.rglob("*.js"))
    assert len(asked) < 10 and 0 < sum(path.stat().st_size for path in asked) < whole / 10


def test_pages_and_steps(page, out):
    open_samples(page, out, "#step=79")
    assert count(page) == "16 prompts"
    seen = heads(page)
    for expected in (6, 4):
        click(page, ".pager button:last-child")
        seen += heads(page)
        assert len(heads(page)) == expected
    assert seen == [f"step 79 · problem-{i}" for i in range(16)]
    assert page.run("document.querySelector('.pager button:last-child').disabled")
    click(page, "#previous")
    assert heads(page)[0] == "step 78 · problem-0"
    act(page, "at('step').value = 5; at('step').onchange()")
    assert heads(page)[0] == "step 5 · problem-0" and "step=5" in page.run("location.hash")
    click(page, "#next")
    assert heads(page)[0] == "step 6 · problem-0"
    click(page, "#every")
    assert count(page) == f"{STEPS * PROMPTS + len(HOSTILE):,} prompts" and heads(page)[0] == "step 1 · problem-0"
    page.screenshot(out.parent / "samples.png")
    assert (out.parent / "samples.png").stat().st_size > 20_000


def open_report(page, folder):
    page.open("about:blank")
    page.open((folder / "index.html").as_uri())
    page.wait("document.readyState === 'complete' && document.querySelectorAll('.plot svg .line').length > 0")


def pointer(page, kind, part, height=100):
    """Sends a pointer event to the first plot, at a fraction of the width between its edges."""
    page.run(f"""(() => {{
        const box = document.querySelector('.plot'), place = box.getBoundingClientRect();
        const x = place.left + EDGE.left + {part} * (place.width - EDGE.left - EDGE.right);
        box.dispatchEvent(new PointerEvent('{kind}', {{ clientX: x, clientY: place.top + {height} }}));
    }})()""")


def tip(page):
    return page.run("(document.querySelector('.tip:not([hidden])') ?? {}).textContent ?? null")


def read_value(page, label):
    return float(re.search(rf"{label}: ([\d.]+)", tip(page))[1])


def shown_steps(page):
    return page.run(
        "[...document.querySelectorAll('.plot')[0].querySelectorAll('[text-anchor=middle]')].map(t => t.textContent)"
    )


def test_a_plot_reads_values_and_zooms(page, out):
    run = runs.read([out.parent / "<b>run<b>"])[0]
    accuracy = run.metrics["rewards/accuracy/mean"]
    open_report(page, out)
    assert tip(page) is None
    pointer(page, "pointermove", 0)
    assert tip(page).startswith("step 1refinements: ") and read_value(page, "refinements") == pytest.approx(
        100 * accuracy[1], rel=1e-3
    )
    pointer(page, "pointermove", 0.5)
    assert tip(page).startswith("step 40") and read_value(page, "refinements") == pytest.approx(
        100 * accuracy[40], rel=1e-3
    )
    # Dragged from a quarter to a half: steps 20 or so to 40.
    pointer(page, "pointerdown", 0.25)
    pointer(page, "pointermove", 0.4)
    assert page.run("document.querySelectorAll('.chosen').length") == 1
    pointer(page, "pointerup", 0.5)
    inside = [int(text) for text in shown_steps(page)]
    assert inside and min(inside) >= 20 and max(inside) <= 40
    pointer(page, "pointermove", 1)
    assert tip(page).startswith("step 40")
    page.run("document.querySelector('.legend button:not([hidden])').click()")
    pointer(page, "pointermove", 1)
    assert tip(page).startswith("step 79")  # step 80 has no accuracy
    pointer(page, "pointerleave", 1)
    assert tip(page) is None
    page.run("document.querySelector('.plot').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))")
    page.run("document.querySelector('.plot').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))")
    assert tip(page).startswith("step 2")


def test_plots_are_all_drawn_and_names_in_them_are_text(page, out):
    for width in (1280, 390):
        page.look(width, 900)
        open_report(page, out)
        page.run("for (const part of document.querySelectorAll('details')) part.open = true")
        page.wait("[...document.querySelectorAll('figure')].every(f => f.querySelector('.plot > svg'))")
        assert page.run("document.querySelectorAll('figure img').length") == 0
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.querySelectorAll('figure a[href^=javascript], figure script').length") == 0
        assert "<img src=x onerror=alert(1)>" in page.run("document.querySelector('main').textContent")
        assert "NaN" not in page.run(
            "[...document.querySelectorAll('.plot path')].map(p => p.getAttribute('d')).join()"
        )
    assert page.run("window.hacked") is None


def test_filters_show_what_they_say(page, out):
    open_samples(page, out, "#step=40")
    every = page.run("steps().map(step => step.flags)")
    for place, name in enumerate(samples.FLAGS):
        there = [flags for flags in every[39] if flags >> place & 1]
        click(page, f"button[name={name}]")
        assert count(page).split()[0] == str(len(there)), name
        cards = f"[...document.querySelectorAll('.prompt')].map(one => one.querySelectorAll('.chip.{name}').length)"
        assert len(page.run(cards)) == min(len(there), 6) and all(page.run(cards)), name
        assert page.run(f"document.querySelector('button[name={name}]').textContent") == f"{name} {len(there)}"
        click(page, f"button[name={name}]")
    both = [flags for step in every for flags in step if flags & 1 and flags & 8]  # of all steps, fixed and truncated
    act(page, "change({ flags: ['fixed', 'truncated'], every: true })")
    assert count(page).split()[0] == f"{len(both):,}" and both


def test_search(page, out):
    open_samples(page, out, "#step=40")
    text = (out / "data" / "0" / "000040_0.js").read_text()
    groups = json.loads(text[text.index(",") + 1 : -2])
    word = max((word for one in groups for word in one["drafts"][0]["text"].split()), key=len)
    holding = [one["id"] for one in groups if any(word in x["text"] for x in one["drafts"] + one["completions"])]
    act(page, f"at('query').value = {json.dumps(word.upper())}; at('query').onchange()")
    assert heads(page) == [f"step 40 · {name}" for name in holding][:6] and count(page).split()[0] == str(len(holding))
    assert page.run("CSS.highlights.get('found').size") > 0
    act(page, "change({ query: 'other $$', every: true })")  # through the data of all steps
    assert count(page) == "1 prompt" and heads(page)[0].startswith(f"step {STEPS + 1} · $$")
    act(page, "change({ query: 'aaaaaaaa' })")  # in capitals there
    assert count(page) == "1 prompt"
    act(page, "change({ query: 'nowhere to be found' })")
    assert heads(page) == [] and "No prompt" in page.run("at('prompts').textContent")


def test_a_prompt_shows_drafts_choice_refinements_and_scores(page, out):
    text = (out / "data" / "0" / "000040_0.js").read_text()
    groups = json.loads(text[text.index(",") + 1 : -2])
    place, group = next((i, one) for i, one in enumerate(groups) if one["kept"])  # not the first draft
    open_samples(page, out, f"#step=40&page={place // 6 + 1}")
    one = f"document.querySelectorAll('.prompt')[{place % 6}]"
    card = page.run(f"{one}.textContent")
    assert group["question"] in card and f"right answer: {group['answer']}" in card
    assert page.run(f"{one}.querySelectorAll('.sample').length") == 8
    chosen = page.run(f"{one}.querySelector('.chip.kept').closest('.sample').textContent")
    kept = group["drafts"][group["kept"]]
    assert chosen.startswith(f"draft {group['kept'] + 1} of 4★ kept") and kept["text"] in chosen
    assert f"Refinements of the kept draft, draft {group['kept'] + 1} of 4" in card and "refinement 1 of 4" in card
    first, refined = page.run(f"{one}.querySelector('.refinements .sample').textContent"), group["completions"][0]
    for part in (f"answers {refined['extracted']}", "accuracy ", "advantage ", f"{refined['tokens']:.0f} tokens"):
        assert part in first
    old = f"[...{one}.querySelector('.refinements .sample pre').childNodes].filter(n => n.tagName !== 'INS')"
    new = old.replace("INS", "DEL")
    assert page.run(f"{old}.map(n => n.textContent).join('')") == kept["text"]
    assert page.run(f"{new}.map(n => n.textContent).join('')") == refined["text"]
    click(page, "#diff")
    assert page.run(f"{one}.querySelector('.refinements .sample pre').textContent") == refined["text"]
    assert page.run("document.querySelector('ins, del')") is None
    # Other drafts are closed, and filled when they are opened.
    assert page.run(f"{one}.querySelector('.sample:not([open])').childElementCount") == 1
    page.run(f"{one}.querySelector('.sample:not([open]) > summary').click()")
    page.wait(f"{one}.querySelector('.sample pre').textContent.length > 10")


def test_verifications_are_called_by_their_name(page, browser, tmp_path):
    row = {"prompt_id": "p", "prompt": "1 + 1", "token_count": 3, "finished": True, "status": "ok", "reward": 1.0}
    rows = [
        row | {"stage": "draft", "sample_id": i, "text": f"It is {i}.", "rewards": {"accuracy": 0.0}, "answer": "2"}
        for i in range(2)
    ]
    verdict = {"text": "It is 0, so no.", "rewards": {"accuracy": 1.0}, "extracted": "0", "answer": "0"}
    rows.append(row | verdict | {"stage": "verify", "sample_id": 0, "parent_draft_id": 1, "advantage": 0.5})
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    (tmp_path / "run" / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    pages.build([tmp_path / "run"], tmp_path / "report")
    open_samples(page, tmp_path / "report")
    card = page.run("document.querySelector('.prompt').textContent")
    assert "Verifications of the kept draft, draft 2 of 2" in card and "verification 1 of 1" in card
    assert "verifications: 1 of 1 right" in card and "right answer: 2" in card and "efinement" not in card
    assert page.run("document.querySelector('ins, del')") is None and "are not shown" not in card  # no comparison
    browser.requests.clear()  # this report lies elsewhere


def test_hostile_text_is_inert(page, out):
    seen = ""
    for number in (1, 2):
        open_samples(page, out, f"#step={STEPS + 1}&page={number}")
        page.run("for (const one of document.querySelectorAll('details')) one.open = true")
        seen += page.run("at('prompts').textContent")
        assert page.run("at('prompts').querySelectorAll('a, img, script, style, iframe, object, link').length") == 0
        names = page.run("[...at('prompts').querySelectorAll('*')].flatMap(one => one.getAttributeNames())")
        assert set(names) <= {"class", "open", "type"}
        assert page.run("document.scripts.length") == 2 and page.run("document.documentElement.scrollWidth") <= 1280
    assert page.run("window.hacked") is None and page.run("getComputedStyle(document.body).display") == "block"
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[6], HOSTILE[2].replace("link", "li\ufffdnk"), "{{ 7 * 7 }} ${7 * 7}"):
        assert f"other {text}" in seen or text in seen
    for text in ("⟨U+001B⟩[31mred", "⟨U+202E⟩gnp", "lone ⟨U+D800⟩ surrogate", "⟨U+0000⟩"):
        assert text in seen
    assert not set(seen) & {"\x1b", "\x00", "\u202e"}
    # A megabyte without a space is cut, and there on demand.
    assert "show 980,000 more characters" in seen and "A" * 21_000 not in seen
    page.look(390, 844)
    open_samples(page, out, f"#step={STEPS + 1}&query=AAAA")
    click(page, "#diff")
    page.run("document.querySelectorAll('pre button').forEach(one => one.click())")
    assert (
        page.run("Math.max(...[...document.querySelectorAll('pre')].map(one => one.textContent.length))") >= 1_000_000
    )
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_differences(page, out):
    """Both texts can be read off them, they are as few as can be, and texts too far apart are told from others."""
    open_samples(page, out)
    draw = random.Random(0)
    words = ["a", "b ", "c\n", "1", "+", "\\frac", "é"]
    texts = ["".join(draw.choices(words, k=draw.randrange(30))) for _ in range(300)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for (a, b), changes in zip(pairs, page.run(f"{json.dumps(pairs)}.map(([a, b]) => differences(a, b))"), strict=True):
        assert "".join(text for kind, text in changes if kind in "=-") == a
        assert "".join(text for kind, text in changes if kind in "=+") == b
        kinds = [kind for kind, _ in changes]
        assert not [1 for one, other in itertools.pairwise(kinds) if one == other]
    diff = lambda a, b: page.run(f"differences({json.dumps(a)}, {json.dumps(b)})")
    assert diff("7-3=5+1", "7-3=4+1") == [["=", "7-3="], ["-", "5"], ["+", "4"], ["=", "+1"]]
    phrase = [["=", "so it "], ["-", "is big"], ["+", "was very old"], ["=", " news"]]
    assert diff("so it is big news", "so it was very old news") == phrase
    assert diff("x", "x") == [["=", "x"]] and diff("", "") == [] and diff("", "x") == [["+", "x"]]
    words = [" ".join(f"{letter}{i}" for i in range(2000)) for letter in "ab"]
    assert diff(*words) is None and diff(words[0], words[0] + " end")[-1] == ["+", " end"]


def test_changes_are_shown_only_where_half_of_the_words_are_kept(page, out):
    open_samples(page, out)
    marks = lambda draft, words: page.run(
        f"text({json.dumps(words)}, {json.dumps(draft)}).querySelectorAll('ins, del').length"
    )
    told = lambda draft, words: page.run(f"text({json.dumps(words)}, {json.dumps(draft)}).textContent")
    assert marks("a b c d", "a b x y") > 0  # two of four words; spaces do not count
    assert marks("a b c d", "a x y z") == 0
    assert told("a b c d", "a x y z") == "(less than half is as in the draft, so changes are not shown)\na x y z"
    assert marks("a b", "a b c d e") == 0 and marks("a b c d e", "a b") == 0  # of the longer text
    assert marks("a", "a") == 0 and told("a", "a") == "a" and told("", "") == ""


def test_the_toolbar_is_small_on_a_phone(page, out):
    page.look(390, 844)
    open_samples(page, out)
    height = lambda: page.run("document.querySelector('.tools').getBoundingClientRect().height")
    assert height() <= 100  # of 844; it was 240
    assert page.run("document.querySelector('#query').offsetParent") is None
    assert page.run("[...document.querySelectorAll('.tools button')].filter(b => b.offsetParent).length") >= 5
    click(page, "#more")
    assert page.run("document.querySelector('#query').offsetParent !== null") and height() > 100
    click(page, "button[name=fixed]")
    click(page, "#more")
    assert height() <= 100 and page.run("at('more').textContent") == "filters (1)"
    page.look(1280, 900)
    assert page.run("document.querySelector('#query').offsetParent !== null && at('more').offsetParent === null")


def test_several_runs(page, tmp_path, monkeypatch, out):
    monkeypatch.setattr(figures, "write", lambda *_: {})
    made = [tmp_path / ("a" * 30), tmp_path / "base"]
    report_scale.write_run(made[0], 2, 3, words=5, evaluate=1)
    report_scale.write_run(made[1], 3, 2, drafts=0, words=5)
    folder = out / "two"  # where requests are allowed
    pages.build(made, folder)
    page.look(390, 844)
    page.open((folder / "index.html").as_uri())
    page.wait("document.readyState === 'complete' && document.querySelector('table')")
    assert page.run("document.documentElement.scrollWidth") <= 390
    names = page.run(
        "[...document.querySelectorAll('.table')[0].querySelectorAll('thead th')].map(one => one.textContent)"
    )
    assert names == ["", *(run.name for run in made)]
    open_samples(page, folder)
    assert heads(page) == [f"step 2 · problem-{i}" for i in range(3)]
    act(page, "at('run').value = 1; at('run').onchange()")
    assert heads(page) == [f"step 3 · problem-{i}" for i in range(2)]
    assert "drafts:" not in page.run("at('prompts').textContent")
    assert page.run("document.querySelector('h3').textContent") == "Completions"


def test_data_that_is_gone_is_said(browser, out, tmp_path):
    path = out / "data" / "0" / "000007_0.js"
    content = path.read_text()
    path.unlink()
    browser.open("about:blank")
    browser.open((out / "samples.html").as_uri() + "#step=7")
    browser.wait("document.querySelector('.lost')")
    assert "data/0/000007_0.js cannot be read" in browser.run("document.querySelector('.lost').textContent")
    path.write_text(content)
