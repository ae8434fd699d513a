"""Keys of configs that change what the model computes, and those that do not."""

import json

import pytest
import torch
from helpers.checkpoints import ARGS, assert_loads, edit, load, refusal

from mixtral.checkpoint import read_eos_ids, read_params

ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
HARMFUL = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": "dynamic"},
    {"rope_parameters": ROPE},
    {"hidden_act": "gelu"},
    {"model_type": "mistral"},
    {"tie_word_embeddings": True},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"attention_chunk_size": 8},
    {"per_layer_config": {"1": {"head_dim": 16}}},
    {"sliding_window": 8},
    {"sliding_window": [None, 8]},
    {"yarn": {"factor": 4}},
    {"lora": {"rank": 64}},
    {"lora": {"enable": True, "rank": 64}},
    {"lora": {"enable": None, "rank": 64}},
    {"quantization": {"qformat_weight": "fp8_e4m3"}},
    {"quantization_config": {"quant_method": "awq"}},
]
HARMLESS = [
    {"rope_scaling": {}, "sliding_window": False, "yarn": {}, "lora": None},
    {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    {"layer_types": ["full_attention"] * 2, "hidden_act": "swish"},
    {"partial_rotary_factor": 0.5, "attention_bias": True, "rope_type": "yarn"},
    {"max_position_embeddings": 8, "router_jitter_noise": 0.5, "type": "linear"},
    # What mistral-finetune writes beside weights into which it has merged its own.
    {"lora": {"enable": False, "rank": 16, "dropout": 0.0, "scaling": 2.0}},
]


@pytest.mark.parametrize("layout, name", [("A", "params.json"), ("D", "config.json")])
@pytest.mark.parametrize("keys", [*HARMFUL, *HARMLESS], ids=str)
def test_keys_of_configs(copy_of, source, logged, layout, name, keys):
    folder = copy_of(layout)
    edit(name, **keys)(folder)
    if keys in HARMFUL:
        message = refusal(folder, before_loading=True)
        key = "rope_type" if "rope" in str(keys) else min(keys)
        assert str(folder / name) in message and key in message
    else:
        assert_loads(folder, source)
        assert load(folder).params == ARGS and logged == []


@pytest.mark.parametrize("keys", [*HARMFUL[:-2], *HARMLESS], ids=str)
def test_transformers_agrees_on_the_keys(copy_of, source, keys):
    """A key is refused if and only if transformers' logits change, or it fails too."""
    from transformers import MixtralForCausalLM

    if keys.keys() & {"yarn", "lora", "tie_word_embeddings", "model_type"}:
        pytest.skip("a key of params.json, or not one of MixtralForCausalLM's")
    folder = copy_of("D")
    tokens = torch.arange(32)[None]
    edit("config.json", rope_parameters=None, rope_theta=5e5)(folder)

    def logits() -> torch.Tensor | None:
        try:
            model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
            cache = model(tokens[:, :16], use_cache=True).past_key_values
            return model(tokens[:, 16:], past_key_values=cache).logits
        except Exception:  # noqa: BLE001 - whatever transformers raises
            return None

    want = logits()
    edit("config.json", **keys)(folder)
    got = logits()
    same = got is not None and torch.allclose(got, want, atol=1e-4)
    assert same == (keys in HARMLESS)


def test_the_early_sliding_window(copy_of, source, logged):
    folder = copy_of("D")
    edit("config.json", sliding_window=4096, n_heads=2)(folder)  # n_heads is unknown
    assert_loads(folder, source)
    assert len(logged) == 1 and "sliding_window 4096 is ignored" in logged[0]


def test_a_vocabulary_larger_than_the_tokenizers(copy_of):
    """Fine-tunes pad it; whether it suits the tokenizer is not known here."""
    folder = copy_of("A")
    edit("params.json", vocab_size=32002)(folder)
    assert read_params(folder, 16, 1).vocab_size == 32002


# Which tokens end a text


@pytest.mark.parametrize(
    "generation, config, want",
    [
        ({}, {}, set()),
        (None, None, set()),
        ({"eos_token_id": 39}, {"eos_token_id": 2}, {39}),
        ({"eos_token_id": [39, 2]}, None, {39, 2}),
        ({"eos_token_id": None}, {"eos_token_id": 2}, {2}),
        (None, {"eos_token_id": [7]}, {7}),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, {0}),
    ],
)
def test_eos_ids(tmp_path, generation, config, want):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert read_eos_ids(tmp_path) == want


@pytest.mark.parametrize("eos", [-1, True, 2.0, "2", [2, "</s>"], {"a": 1}])
def test_eos_ids_that_are_none(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config.json: .* is not a token id"):
        read_eos_ids(tmp_path)


def test_damaged_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="generation_config.json is not a JSON object: download"):
        read_eos_ids(str(tmp_path))
