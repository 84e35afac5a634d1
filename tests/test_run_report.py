"""The page of a run: every kind of run, what is not here is said, wrong names are one sentence, no request leaves the page."""
import re
from dataclasses import replace

import numpy as np
import pytest

from fvlm.app import cli, run_parts, run_report as module
from fvlm.app.report import Report
from fvlm.app.run_parts import beside_rivals, explorer_onto, log_curves
from fvlm.app.run_report import ReportCommand, record_page, run_report
from fvlm.core import ConfigError, InputError, WeightsError
from fvlm.data.embedding_cache import EmbeddingCache
from fvlm.encoders.embeddings import FrameEmbedder
from fvlm.evidence.experiment import train_arm
from fvlm.instruments.attention_explorer import AttentionExplorer
from fvlm.instruments.checkup import foveated_checkup, sc_vfp_checkup
from fvlm.models.sc_vfp import SCVFP, SCVFPConfig
from fvlm.recipes.example_models import example_clips, example_facts, example_model
from fvlm.training.records import write_record
from fvlm.training.recipes import EncoderChoice, ModelSize, open_splits, sc_vfp
from fvlm.training.saved_runs import save_run
from fvlm.app.sc_vfp_commands import judged_table


def table_of(report, heading):
    "Rows of the first table whose columns hold this heading, as text."
    part = next(part for part in report.parts if part["kind"] == "table" and heading in [column["label"] for column in part["columns"]])
    return [[cell["text"] for cell in row["cells"]] for row in part["rows"]]


@pytest.fixture(scope="module")
def pages():
    "The reports of both examples."
    return {name: run_report(f"example:{name}") for name in ("sc_vfp", "fvlm")}


@pytest.mark.parametrize("name", ["sc_vfp", "fvlm"])
def test_an_examples_page_is_whole_and_needs_no_network(name, pages, tmp_path):
    page = pages[name].save(tmp_path / "page.html", quiet=True).read_text(encoding="utf-8")
    assert page.count("<iframe") == 1 and len(page) < 2_000_000
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    facts = example_facts(name)
    rows = {row[0]: row for row in table_of(pages[name], "predictor")}
    assert set(rows) == {name, "mean", "ridge", "linear", *(["coarse pass"] if name == "fvlm" else []), "copy last"}
    assert float(rows[name][1]) == pytest.approx(facts["errors"]["model"], abs=2e-4) and float(rows["ridge"][1]) == pytest.approx(facts["errors"]["ridge"], abs=2e-4)
    assert {"check", "found"} <= {column["label"] for part in pages[name].parts if part["kind"] == "table" for column in part["columns"]}
    assert "Nothing failed" in str(pages[name].parts)


def test_the_explorer_is_left_out_where_it_is_too_large(monkeypatch):
    explorer = AttentionExplorer.from_model(example_model("fvlm"), example_clips("fvlm", num_clips=2).frames[0].numpy())
    for allowed, packed in ((2 * sum(cube.nbytes for cube in explorer.cubes) // 10, 1), (10, 0)):  # a little too large; so large that it is not even packed
        packs = []
        monkeypatch.setattr(run_parts, "EMBEDDED", allowed)
        monkeypatch.setattr(AttentionExplorer, "page", lambda self: packs.append(1) or "x" * (allowed + 1))
        report = explorer_onto(Report("x"), explorer, caption="Here.")
        assert report.parts[0]["kind"] == "figure" and "fvlm explore" in report.parts[0]["caption"] and "iframe src" not in report.html() and len(packs) == packed


def test_a_page_cannot_leave_its_frame():
    page = Report("x").embed('"><script>alert(1)</script>', title="<i>", caption="<b>").html()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page and "<figcaption>&lt;b&gt;</figcaption>" in page and 'title="&lt;i&gt;"' in page


def test_without_instruments(pages):
    report = run_report("example:fvlm", instruments=False)
    assert not {"figure", "page"} & {part["kind"] for part in report.parts}
    assert sum(part["kind"] == "figure" for part in pages["fvlm"].parts) == 4


# --- a folder of `fvlm train` ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A finished run on generated worlds with a tiny encoder."
    root = tmp_path_factory.mktemp("run")
    out, cache, patch = root / "mine", EmbeddingCache(root / "embeddings"), pytest.MonkeyPatch()
    recipe = replace(sc_vfp(), videos="worlds", encoder=EncoderChoice(weights="random_tiny", layer=None, pooling="cls"), size=ModelSize(width=16, num_heads=2, ffn_dim=16, mlp_dims=()))
    recipe = replace(recipe, training=replace(recipe.training, steps=6, val_every=2, log_every=2, precision="fp32"))
    embedder = FrameEmbedder.tiny()
    splits, _ = open_splits(recipe, embedder, cache=cache, progress=False)
    trained = train_arm(recipe, splits, out=out, progress=False)
    save_run(out, trained.model, recipe, splits, embedder.fingerprint)
    judged_table(recipe, splits, trained.by_clip, trained.model.num_parameters, 1.0, out / "records")
    patch.setattr(EncoderChoice, "load", lambda self, download=False: embedder)
    patch.setattr(module, "open_splits", lambda recipe, embedder, download=False, progress=True: open_splits(recipe, embedder, cache=cache, progress=False))
    yield out
    patch.undo()


def test_a_trained_folder_has_everything(folder):
    report = run_report(str(folder))
    assert {row[0] for row in table_of(report, "predictor")} == {"mean", "copy_last", "linear", "ridge", "scmhsa"}
    assert any(part["kind"] == "curves" for part in report.parts) and sum(part["kind"] == "page" for part in report.parts) == 1
    assert {"bottleneck", "heads", "attention entropy"} <= {part["alt"].split(":")[0] for part in report.parts if part["kind"] == "figure"}


@pytest.mark.parametrize("what", ["weights", "clips", "encoder"])
def test_what_is_not_here_is_said_and_the_rest_is_shown(what, folder, monkeypatch):
    if what == "weights":
        def load(self, download=False):
            raise WeightsError("random_tiny: nowhere; fvlm weights get random_tiny")
        monkeypatch.setattr(EncoderChoice, "load", load)
    elif what == "encoder":
        monkeypatch.setattr(EncoderChoice, "load", lambda self, download=False: FrameEmbedder.tiny(5))
    else:
        def opened(*args, **options):
            raise InputError("videos: the folder has gone")
        monkeypatch.setattr(module, "open_splits", opened)
    report = run_report(str(folder))
    (note,) = [part for part in report.parts if part["kind"] == "note" and part["title"] == "Not shown"]
    assert {"weights": "fvlm weights get", "encoder": "this encoder is", "clips": "the folder has gone"}[what] in note["paragraphs"][0]
    assert table_of(report, "predictor") and any(part["kind"] == "curves" for part in report.parts) and not any(part["kind"] == "page" for part in report.parts)


def test_an_unfinished_folder_is_named(folder, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "log.jsonl").write_text('{"split": "train", "step": 1, "loss": 1.0}\n')
    with pytest.raises(InputError, match="did not finish.*--resume auto"):
        run_report(str(tmp_path / "half"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="run"):
        run_report(str(tmp_path / "empty"), root=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("[]")
    with pytest.raises(ConfigError, match="run.json"):
        run_report(str(tmp_path / "broken"))


# --- records --------------------------------------------------------------------------------------------------------

@pytest.fixture
def root(tmp_path):
    "A study of three runs with two seeds, one of them judged on other data; one run with looks."
    draw = np.random.default_rng(0)

    def write(run, by_clip, metrics, data="the same"):
        write_record(tmp_path, "study", run, config={"run": run}, metrics=metrics, metrics_by_clip=by_clip, conventions={name: "a mean" for name in by_clip}, data_fingerprint=data, parameters=7, seconds=1.0)

    for arm, level in (("ours", 0.5), ("ridge", 1.0), ("elsewhere", 0.1)):
        for seed in range(2):
            clips = {f"clip{c}": float(level + 0.1 * draw.random()) for c in range(9)}
            write(f"a--{arm}--seed{seed}", {"mse": clips}, {"mse": float(np.mean(list(clips.values()))), "mse_at_step_0010": 2.0, "mse_at_step_0020": 1.0}, data="other" if arm == "elsewhere" else "the same")
    looks = {look: {f"clip{c}": float(level + 0.1 * draw.random()) for c in range(9)} for look, level in (("own", 0.3), ("static", 1.0), ("other_clip", 1.2))}
    write("b--looks--seed0", looks, {"own_frame1": 1.0, "own_frame2": 0.5})
    return tmp_path


def test_a_record_is_beside_those_judged_on_the_same_clips(root):
    report = run_report("study/a--ours", root=root)
    rows = {row[0]: row for row in table_of(report, "run")}
    assert set(rows) == {"a--ours", "a--ridge"} and rows["a--ridge"][-1] == "differs" and rows["a--ridge"][2].startswith("−")
    assert "2 seeds" in report.lead and len(table_of(report, "clip")) == 9
    assert any(part["kind"] == "curves" and part["title"] == "By step" for part in report.parts)
    assert run_report(str(root / "study" / "a--ours--seed0.json")).lead.startswith("mse")


def test_looks_of_a_record_are_judged(root):
    report = run_report("study/b--looks", root=root)
    assert [row[0] for row in table_of(report, "look")] == ["own", "other clip", "static"] or {row[0] for row in table_of(report, "look")} == {"own", "other clip", "static"}
    assert "Nothing failed" in str(report.parts) and any(part.get("title") == "By frame" for part in report.parts)


def test_names_that_are_no_run(root):
    with pytest.raises(InputError, match="names 4 runs"):
        record_page("study", root=root)
    with pytest.raises(ConfigError, match="a--ours"):
        run_report("study/a--our", root=root)
    for name in ("example:nobody", "example:Fvlm"):
        with pytest.raises(ConfigError, match="example:sc_vfp or example:fvlm"):
            run_report(name)
    with pytest.raises(InputError):
        run_report("nothing", root=root / "not there")


# --- parts ------------------------------------------------------------------------------------------------------------

def test_rivals_beside_the_model():
    draw = np.random.default_rng(1)
    own = 0.5 + 0.1 * draw.random(30)
    report = beside_rivals(Report("x"), {"model": own, "ridge": own * 2, "zero": np.zeros(30)}, caption="c")
    rows = {row[0]: row for row in table_of(report, "predictor")}
    assert rows["ridge"][2] == "50.0%" and rows["zero"][2] == "–" and rows["model"][2] == "–"
    one = beside_rivals(Report("x"), {"model": [0.5], "ridge": [1.0]}, caption="c")
    assert table_of(one, "predictor")[1][2] == "–"


def test_curves_of_a_log():
    rows = [{"split": split, "step": step, "loss": 1.0 / step, "mse": 1.0 / step} for step in (1, 2, 3) for split in ("train", "val")]
    (part,) = log_curves(Report("x"), rows).parts
    assert [line["name"] for line in part["chart"]["lines"]] == ["training clips, loss", "validation clips, loss"]
    assert log_curves(Report("x"), []).parts == [] and log_curves(Report("x"), [{"split": "train", "step": 1, "loss": None}]).parts == []


def test_checkups_name_faults_and_write_a_section():
    import torch

    clips = example_clips("fvlm", num_clips=12)
    ill = example_model("fvlm")
    ill.query_attention.fixed_temperature = float("inf")
    found = foveated_checkup(ill, clips.inputs)
    assert set(found.verdict().failures) >= {"uniform attention", "dead link"}
    report = found.onto(Report("x"), title="Here")
    assert report.parts[0]["text"] == "Here" and "Failed: " in report.parts[1]["paragraphs"][0] and sum(part["kind"] == "figure" for part in report.parts) == 4
    for attention in ("scmhsa_folded", "hybrid", "mhsa_chunked"):
        model = SCVFP(SCVFPConfig.preset("tiny", attention=attention))
        torch.nn.init.normal_(model.mlp[-1].weight)
        windows = type("Windows", (), {"__len__": lambda self: 40, "batch": lambda self, i: {"embeddings": torch.randn(len(i), 5, 16, generator=torch.Generator().manual_seed(0)), "target": torch.zeros(len(i), 16)}})()
        assert "dead heads" not in sc_vfp_checkup(model, windows).verdict().failures
    with pytest.raises(InputError, match="at least 2"):
        foveated_checkup(ill, example_clips("fvlm", num_clips=1).inputs)


# --- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def command(monkeypatch):
    "`fvlm report ...` as people call it."
    monkeypatch.setitem(cli.COMMANDS, "report", ("fvlm.app.run_report:ReportCommand", "the page of a run"))
    return lambda *words: cli.main(["report", *words])


def test_the_command_writes_a_page(command, tmp_path, capsys):
    assert command("example:sc_vfp", "--no-instruments", "--out", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").is_file() and "page.html" in capsys.readouterr().out


def test_the_command_explains_itself(command, capsys):
    assert command("--help") == 0
    shown = capsys.readouterr().out
    assert "RUN" in shown and all(example in shown for example in ReportCommand.EXAMPLES) and "--no-instruments" in shown


@pytest.mark.parametrize("words, said", [(["example:nobody"], "example:sc_vfp or example:fvlm"), (["example:fvlm", "--out", "page.pdf"], "ends in .html"), (["no/such/run"], "no/such/run")])
def test_the_command_is_wrong_in_one_line(words, said, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
