"""Data cards: all of them are read, every mistake is named by card and path, nothing of YAML's traps gets through."""
import copy
import re
from pathlib import Path

import pytest
import yaml

import fvlm
from fvlm.annotation_rows import FILTERS, fill
from fvlm.core import ConfigError
from fvlm.data.cards import CardError, card_schema, list_cards, load_card, parse_card
from fvlm.item_facts import expand, value_fits

NAMES = ("epic_kitchens", "hmdb51", "kinetics400", "kth", "moving_mnist", "penn_action", "sample_clips", "something_something_v2",
         "ucf101", "ucf_sports", "ucsd_pedestrian", "webvid", "worlds")
STATUS = {"webvid": "withdrawn", "something_something_v2": "gated", "sample_clips": "bundled", "worlds": "generated"}


def text_of(name):
    return load_card(name).path.read_text(encoding="utf-8")


def header_of(name):
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", text_of(name), re.DOTALL)[1])


def parsed(header):
    return parse_card(f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False)}---\nbody\n", "x.md")


# --- the cards that come with the package ----------------------------------------------------------------------------

def test_these_cards_are_there():
    assert list_cards() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_card_is_read(name):
    card = load_card(name)
    assert card.name == name and card.body.startswith("# ") and card.rules.status == STATUS.get(name, "available")
    assert len(card.rules.obtain) > 40 and card.header.tags


@pytest.mark.parametrize("name", NAMES)
def test_every_card_fits_the_schema(name):
    from jsonschema import Draft202012Validator

    schema = card_schema()
    Draft202012Validator.check_schema(schema)
    assert list(Draft202012Validator(schema).iter_errors(header_of(name))) == []
    broken = header_of(name)
    broken["fvlm"]["layuot"] = {}
    assert list(Draft202012Validator(schema).iter_errors(broken))


@pytest.mark.parametrize("name", NAMES)
def test_every_card_answers_the_same_questions(name):
    "Gebru et al.'s questions, as headings of the body."
    headings = [line.removeprefix("## ").lower() for line in load_card(name).body.splitlines() if line.startswith("## ")]
    for word in ("motivation", "composition", "collection", "uses", "people", "licence", "known issues"):
        assert any(word in heading for heading in headings), f"{name}: no heading on {word}; has {headings}"


def test_the_withdrawn_card_names_no_address():
    text = text_of("webvid")
    assert not re.search(r"https?:|www\.|\b[\w-]+\.(?:com|org|net|io|uk)\b", text) and "withdr" in load_card("webvid").rules.obtain


def test_protocols_of_kth():
    card = load_card("kth")
    sides = {person: card.protocol().side_of(f"{person:02d}") for person in range(1, 26)}
    assert [p for p, s in sides.items() if s == "test"] == list(range(17, 26)) and [p for p, s in sides.items() if s == "val"] == [4, 8, 12, 16]
    counts = [list({p: card.protocol("persons_8_8_9").side_of(p) for p in range(1, 26)}.values()).count(side) for side in ("train", "val", "test")]
    assert counts == [8, 8, 9]


def test_ucf_sports_splits_150_clips_into_103_and_47():
    card = load_card("ucf_sports")
    keys = [fill(e.key, {"label": label, "number": number}) for e in card.rules.layout.expected for label in e.facts["label"] for number in expand(e.facts["number"])]
    sides = [card.protocol().side_of(key) for key in keys]
    assert len(keys) == len(set(keys)) == 150 and sides.count("train") == 103 and sides.count("test") == 47


# --- finding them ----------------------------------------------------------------------------------------------------

def test_cards_inside_the_package_come_first(tmp_path, monkeypatch):
    for folder, tag in ((tmp_path / "fvlm" / "data_cards", "inside"), (tmp_path / "data_cards", "checkout")):
        folder.mkdir(parents=True)
        (folder / "kth.md").write_text(text_of("kth") + tag, encoding="utf-8")
    (tmp_path / "data_cards" / "other.md").write_text(text_of("kth"), encoding="utf-8")
    monkeypatch.setattr(fvlm, "__file__", str(tmp_path / "fvlm" / "__init__.py"))
    assert load_card("kth").body.endswith("inside") and list_cards() == ("kth", "other")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(CardError, match="'kht'.*did you mean 'kth'"):
        load_card("kht")
    assert issubclass(CardError, ConfigError)


@pytest.mark.parametrize("name", ["../data_cards/kth", "README", ""])
def test_a_name_is_not_a_path(name):
    with pytest.raises(CardError, match="expected one of"):
        load_card(name)


def test_a_card_of_your_own(tmp_path):
    (tmp_path / "mine.md").write_bytes(b"\xef\xbb\xbf" + text_of("kth").replace("\n", "\r\n").encode())  # as some editors write it
    assert load_card(tmp_path / "mine.md").name == load_card(str(tmp_path / "mine.md")).name == "mine"
    with pytest.raises(CardError, match="nothing.md: cannot be read"):
        load_card(tmp_path / "nothing.md")
    (tmp_path / "latin.md").write_bytes("---\nä".encode("latin-1"))
    with pytest.raises(CardError, match="latin.md"):
        load_card(tmp_path / "latin.md")


# --- strictness ------------------------------------------------------------------------------------------------------

def places(value, path=()):
    "Every path into a tree of mappings and lists."
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(header, path, value):
    header = copy.deepcopy(header)
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return header


@pytest.mark.parametrize("name", ["kth", "moving_mnist", "worlds"])
def test_a_value_of_the_wrong_type_is_named_wherever_it_stands(name):
    header = header_of(name)
    for path in places(header):
        if path:
            with pytest.raises(CardError) as caught:
                parsed(changed(header, path, [[[]]]))
            dotted = ".".join(map(str, path))
            assert str(caught.value).startswith(f"x.md: {dotted}"), f"{dotted}: {caught.value}"


@pytest.mark.parametrize("name", ["kth", "epic_kitchens", "worlds"])
def test_an_unknown_field_is_named_wherever_it_stands(name):
    header, free = header_of(name), re.compile(r"\.(?:fields|protocols|sides|facts)$")
    for path in places(header):
        dotted = ".".join(map(str, path))
        inner = header
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and not free.search(dotted):
            with pytest.raises(CardError) as caught:
                parsed(changed(header, (*path, "statsu"), 1))
            assert str(caught.value).startswith(f"x.md: {dotted}{'.' if dotted else ''}statsu: unknown field"), f"{dotted}: {caught.value}"


def test_a_missing_field_is_named():
    for path in (("license",), ("fvlm", "status"), ("fvlm", "layout", "tree"), ("fvlm", "media", "fps"), ("fvlm", "splits", "protocols", "persons_16_9", "never_across")):
        header = header_of("kth")
        inner = header
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(CardError, match=rf"^x\.md: {re.escape('.'.join(path))}: is missing"):
            parsed(header)


@pytest.mark.parametrize("path, value, said", [
    (("fvlm", "layout", "items", 0, "pattern"), "(?P<person>", "is not a regular expression"),
    (("fvlm", "annotations", 0, "row_pattern"), "[a-", "fvlm.annotations.0.row_pattern: is not a regular expression"),
    (("fvlm", "annotations", 0, "row_pattern"), None, "fvlm.annotations.0.row_pattern: expected one"),
    (("fvlm", "annotations", 0, "columns"), ["a"], "fvlm.annotations.0.columns"),
    (("fvlm", "annotations", 0, "delimiter"), "", "fvlm.annotations.0.delimiter"),
    (("fvlm", "annotations", 0, "delimiter"), "ab", "one character"),
    (("fvlm", "layout", "fields", "group"), "person{persn}", "fvlm.layout.fields.group: {persn} is not known here.*did you mean 'person'"),
    (("fvlm", "layout", "fields", "group"), "{person|wrods}", "filter 'wrods' is unknown.*did you mean 'words'"),
    (("fvlm", "layout", "fields"), {"key": "{stem}"}, "fvlm.layout.fields.group: is missing"),
    (("fvlm", "layout", "items", 0, "kind"), "vidoe", "expected one of 'video'.*did you mean 'video'"),
    (("fvlm", "layout"), None, "fvlm.layout: expected a layout"),
    (("fvlm", "splits", "default"), "persons_16_8", "did you mean 'persons_16_9'"),
    (("fvlm", "splits", "protocols", "persons_16_9", "by"), "persom", "no rule gives the fact 'persom'.*did you mean 'person'"),
    (("fvlm", "splits", "protocols", "persons_16_9", "never_across"), "grp", "no rule gives the fact 'grp'"),
    (("fvlm", "splits", "protocols", "persons_16_9", "sides"), {"train": ["1-16"], "test": ["16-25"]}, "'16' stands on two sides, train and test"),
    (("fvlm", "splits", "protocols", "persons_16_9", "sides"), {"train": ["01"], "test": [1]}, "'1' stands on two sides"),
    (("fvlm", "version"), 2, "fvlm.version: got 2, expected one of 1"),
    (("fvlm", "version"), True, "fvlm.version: got True"),
    (("fvlm", "obtain"), False, "YAML reads an unquoted yes, no, on or off"),
    (("license",), "aache-2.0", "did you mean 'apache-2.0'"),
    (("fvlm", "media", "sizes"), [[160]], "fvlm.media.sizes.0: got 1 values, expected 2"),
    (("fvlm", "splits", "protocols"), {1: {}}, "the name 1 is not text"),
])
def test_what_types_cannot_say(path, value, said):
    with pytest.raises(CardError, match=said):
        parsed(changed(header_of("kth"), path, value))


@pytest.mark.parametrize("axes", ["TNH", "HWTN", None])
def test_a_stack_needs_its_axes(axes):
    with pytest.raises(CardError, match="axes: got .*'TNHW'"):
        parsed(changed(header_of("moving_mnist"), ("fvlm", "layout", "items", 0, "axes"), axes))


def test_what_is_generated_has_no_layout():
    with pytest.raises(CardError, match="got both"):
        parsed(changed(header_of("worlds"), ("fvlm", "layout"), header_of("kth")["fvlm"]["layout"]))


@pytest.mark.parametrize("text, said", [
    ("no front matter", "expected front matter"),
    ("---\nlicense: mit\n", "expected front matter"),
    ("---\n- a\n---\n", "got list, expected fields"),
    ("---\nlicense: [\n---\n", "line"),
    ("---\nlicense: mit\nlicense: mit\n---\n", "line 3, column 1: field 'license' stands here twice"),
    ("---\nfvlm:\n  media: {a: 1, a: 2}\n---\n", "line 3, column 17: field 'a' stands here twice"),
    ("---\na: &a [1]\nb: *a\n---\n", "references"),
    ("---\na: &a {x: 1}\nb: {<<: *a}\n---\n", "references"),
    ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", "could not determine a constructor"),
    ("---\nlicense: \x00\n---\n", "not YAML"),
    ("---\nlicense: 2026-13-45\n---\n", "not YAML"),
    ("---\n" + "[" * 5000 + "\n---\n", "x.md"),
    ("---\nlicense: mit\n---\n" + "x" * 300_000, "is larger than"),
])
def test_traps(text, said):
    with pytest.raises(CardError, match=r"^x\.md: ") as caught:
        parse_card(text, "x.md")
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_an_unknown_protocol_names_those_there_are():
    with pytest.raises(CardError, match="kth.md: protocol: got 'person_16_9'.*did you mean 'persons_16_9'"):
        load_card("kth").protocol("person_16_9")
    with pytest.raises(CardError, match="this dataset has no split"):
        load_card("sample_clips").protocol()


# --- small parts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, value, fits", [
    ("1-16", "07", True), ("1-16", 16, True), ("1-16", "17", False), ("1-16", "0", False), ("1-16", "x7", False), ("1-16", "7x", False), ("1-16", "", False),
    (1, "01", True), ("1", "01", True), (-1, "-1", True), (1, "-1", False), ("train", "train", True), ("train", "Train", False),
    ("A/001-004", "A/003", True), ("A/001-004", "A/005", False), ("A/001-004", "B/003", False), ("A/001-004", "A/b/003", False),
])
def test_value_fits(rule, value, fits):
    assert value_fits(rule, value) is fits


def test_expand_keeps_zeros():
    assert expand(["08-11", 3, "x", "Train001-003"]) == ["08", "09", "10", "11", "3", "x", "Train001", "Train002", "Train003"]


def test_templates_hold_no_code():
    facts = {"a": "ApplyEyeMakeup", "b": "Holding [something]", "c": "dir/x.y.avi", "n": "007", "HMDB": "RGBVideo"}
    assert fill("{a|words}", facts) == "apply eye makeup" and fill("{b|plain|lower}", facts) == "holding something" and fill("{c|stem}", facts) == "x.y"
    assert fill("{n|number}", facts) == "7" and fill("{n|number|three}", facts) == "007" and fill("{n|six}", facts) == "000007" and fill("{HMDB|words}", facts) == "rgb video"
    assert fill("{a.upper}{a[0]}{a!r}", facts) == "{a.upper}{a[0]}{a!r}" and fill("x{missing}", facts) is None and fill("x", {}) == "x"
    assert set(FILTERS) == {"words", "plain", "lower", "stem", "number", "three", "six"}


def test_cards_are_installed_with_the_package():
    "setup.py maps data_cards/ into the package, as README.md of the folder is left out of the list."
    root = Path(fvlm.__file__).resolve().parents[1]
    if not (root / "setup.py").exists():
        pytest.skip("not a checkout")
    text = (root / "setup.py").read_text(encoding="utf-8")
    assert '"fvlm.data_cards": "data_cards"' in text and '"fvlm.data_cards": ["*.md"]' in text
