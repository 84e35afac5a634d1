"""Contracts of saved models: nothing but safetensors is read, every tensor is checked, every wrong folder gets one sentence."""
import json
import pickle

import pytest
import torch

from fvlm.core import ConfigError, InputError, WeightsError
from fvlm.models.sc_vfp import SCVFP


def test_damaged_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    SCVFP.tiny().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()
    state = load_file(weights)

    def refused(error, words):
        with pytest.raises(error, match=words):
            SCVFP.from_pretrained(folder)
        weights.write_bytes(good_weights), config.write_text(good_config)

    weights.write_bytes(good_weights[: len(good_weights) // 2])
    refused(WeightsError, "not a readable safetensors file")
    weights.write_bytes(pickle.dumps(state))
    refused(WeightsError, "not a readable safetensors file")
    save_file({k: v for k, v in state.items() if k != "norm.bias"}, weights)
    refused(WeightsError, "lacks 1 tensor, the first 'norm.bias'")
    save_file({**state, "extra": torch.zeros(1)}, weights)
    refused(WeightsError, "has 1 unknown tensor, the first 'extra'")
    save_file({**state, "norm.bias": torch.zeros(31)}, weights)
    refused(WeightsError, "norm.bias has shape")
    save_file({**state, "norm.bias": torch.full((32,), float("nan"))}, weights)
    refused(WeightsError, "not finite")
    save_file({**state, "norm.bias": torch.zeros(32, dtype=torch.float16)}, weights)
    refused(WeightsError, "float16")
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state))  # the mixin's fall-back; ours never looks
    refused(WeightsError, "no model.safetensors")
    fields = json.loads(good_config)
    for change, error, words in (
        ({"unknown": 1}, ConfigError, "config field: got 'unknown'"),
        ({"depth": 10**9}, ConfigError, "depth"),
        ({"width": 65536, "ffn_dim": 262144, "num_heads": 1024, "depth": 256}, WeightsError, "lacks"),  # petabytes, if it were built
        ({"attention": "mhsa"}, WeightsError, "has shape"),
        ({"mlp_dims": "12"}, ConfigError, "mlp_dims"),
    ):
        config.write_text(json.dumps({**fields, **change}))
        refused(error, words)
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "embed_dim"}))
    refused(ConfigError, "embed_dim: missing")
    config.write_text("[1]")
    refused(ConfigError, "expected a dict")
    config.write_text("{")
    refused(InputError, "expected a JSON file")


def test_a_folder_that_is_not_there_and_a_hub_that_is_not_either(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name, file, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(WeightsError, match="no config.json"):
        SCVFP.from_pretrained(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="no such folder here, and the hub did not give it"):
        SCVFP.from_pretrained("somebody/something")
