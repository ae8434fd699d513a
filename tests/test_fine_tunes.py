"""Fine-tunes with more tokens, loaded from their folders, equal transformers on the same folder."""

import json

import pytest
import torch
from helpers.layouts import write
from helpers.reference import random_transformer
from helpers.tokens import TEMPLATE, added_tokens_decoder, fine_tune
from transformers import MixtralForCausalLM

from mixtral import Mixtral, ModelArgs

SIZES = {"dim": 16, "n_layers": 2, "head_dim": 8, "hidden_dim": 32, "n_heads": 4, "n_kv_heads": 2}
PROMPTS = ["<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", "A text", " two  spaces"]


@pytest.fixture(params=[32002, 32064], ids=["exact", "padded"])
def folder(request, tmp_path, v1):
    """Random weights, and the tokenizer of Dolphin or Nous-Hermes 2."""
    args = ModelArgs(**SIZES, vocab_size=request.param)
    write(tmp_path, "D-sharded", args, random_transformer(args).state_dict())
    config = {"legacy": True, "added_tokens_decoder": added_tokens_decoder()}
    fine_tune(tmp_path, v1, config={**config, "chat_template": TEMPLATE})
    return tmp_path


def build(folder) -> Mixtral:
    options = {"max_seq_len": 128, "max_batch_size": 4, "num_gpus": 0, "dtype": torch.float32}
    return Mixtral.build(folder, folder / "tokenizer.model", **options)


def continuation(model: MixtralForCausalLM, tokens: list[int], n: int) -> list[int]:
    """transformers' greedy tokens; it ends after the eos of its generation config."""
    options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
    return model.generate(torch.tensor([tokens]), **options)[0, len(tokens) :].tolist()


def test_greedy_text(folder):
    generator = build(folder)
    reference = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    tokens = [generator.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    assert tokens[0][:2] == [1, 32001]
    want = [continuation(reference, each, 12) for each in tokens]
    assert generator.generate(tokens, 12, temperature=0)[0] == want
    texts = [answer["generation"] for answer in generator.text_completion(PROMPTS, 0, 1, 12)]
    assert texts == [generator.tokenizer.decode(each) for each in want]


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("as_list", [False, True])
def test_ends_where_transformers_ends(folder, name, as_list):
    """At the eos_token_id of generation_config.json or config.json, a number or a list."""
    endless = build(folder)
    tokens = endless.tokenizer.encode(PROMPTS[0], bos=True, eos=False)
    free, _ = endless.generate([tokens], 12, temperature=0)
    eos = free[0][5]
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    config["eos_token_id"] = [31999, eos] if as_list else eos
    path.write_text(json.dumps(config))
    reference = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = continuation(reference, tokens, 12)
    assert want[-1] == eos
    assert build(folder).generate([tokens], 12, temperature=0)[0] == [want[:-1]]


@pytest.mark.parametrize("as_dict", [False, True])
def test_ends_at_the_tokenizers_eos_token(folder, as_dict):
    """As when a fine-tune's config.json still has the end of the model it was made from."""
    endless = build(folder)
    tokens = endless.tokenizer.encode(PROMPTS[0], bos=True, eos=False)
    free, _ = endless.generate([tokens], 12, temperature=0)
    name = endless.tokenizer.pieces[free[0][5]]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["eos_token"] = {"content": name} if as_dict else name
    path.write_text(json.dumps(config))
    assert build(folder).generate([tokens], 12, temperature=0)[0] == [free[0][:5]]


def test_a_padding_token_that_the_model_does_not_have(tmp_path, v1, capsys):
    args = ModelArgs(**SIZES, vocab_size=32000)
    write(tmp_path, "D-sharded", args, random_transformer(args).state_dict())
    fine_tune(tmp_path, v1, {"[PAD]": 32000})
    generator = build(tmp_path)
    assert "names tokens that the model does not have, 1 of them" in capsys.readouterr().err
    assert len(generator.text_completion(["A text"], 0, 1, 3)) == 1
    with pytest.raises(ValueError, match="'32000' is not a token id"):
        generator.text_completion(["A [PAD]"])


def test_an_unreadable_end_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr("mixtral.generation.load_checkpoint", None)
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ValueError, match="generation_config.json: '2' is not a token id"):
        build(folder)


def test_a_dialog_is_written_in_chatml(folder):
    generator = build(folder)
    dialog = [{"role": "user", "content": "Hello!"}]
    answer = generator.chat_completion([dialog], 0, max_gen_len=8)[0]["generation"]
    assert answer["role"] == "assistant"
    tokens = generator.tokenizer.encode(PROMPTS[0], bos=False, eos=False)  # as the template says
    want = generator.generate([tokens], 8, temperature=0)[0][0]
    assert answer["content"] == generator.tokenizer.decode(want)


def test_missing_names_are_mentioned(folder, capsys):
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    build(folder)
    padded = "32064" in (folder / "config.json").read_text()
    assert ("added_tokens.json missing" in capsys.readouterr().err) == (not padded)
