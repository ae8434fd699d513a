"""A request reads only those of its prompt's tokens that the cache's first row does not hold."""

from types import SimpleNamespace

import pytest
import torch
from helpers.reference import random_transformer
from helpers.tiny import ARGS, Counted, check_greedy, expected, random_prompts, tiny

from mixtral import Mixtral, ModelArgs, Tokenizer, routing

PROMPT, OTHER = random_prompts([20, 20])


def tokens_read(generator: Mixtral, *request, **options) -> int:
    """By a request's first pass."""
    generator.model.sizes.clear()
    generator.generate(*request, **options)
    return generator.model.sizes[0][0]


def common_prefix(a: list[int], b: list[int]) -> int:
    same = [x == y for x, y in zip(a, b)]
    return [*same, False].index(False)


def test_a_conversation(v1):
    """Ten turns equal ten fresh requests; what an answer's encoding changed is read again."""
    tokenizer = Tokenizer(v1)
    sizes = {"dim": 16, "n_layers": 2, "head_dim": 8, "hidden_dim": 32}
    args = ModelArgs(**sizes, n_heads=4, n_kv_heads=2, vocab_size=32000, max_seq_len=600)
    other = Mixtral(random_transformer(args), tokenizer)
    generator = Mixtral(Counted(random_transformer(args)), tokenizer)
    dialog: list[dict] = []
    held: list[int] = []
    read = []
    lengths = []
    for turn in range(10):
        dialog.append({"role": "user", "content": f"Question {turn}, and what about {turn * 7}?"})
        prompt = tokenizer.encode_dialog(dialog)
        other.first_row.tokens.clear()
        fresh = other.generate([prompt], 12, 0)[0][0]
        generator.model.sizes.clear()
        answer = list(generator.stream_tokens(prompt, 0, max_gen_len=12))
        assert answer == fresh
        read.append(generator.model.sizes[0][0])
        lengths.append(len(prompt))
        assert read[-1] == len(prompt) - common_prefix(held, prompt)
        held = prompt + answer
        if len(answer) == 12:
            held.pop()  # the last token was not given to the model
        dialog.append({"role": "assistant", "content": tokenizer.decode(answer)})
    assert sum(read) < sum(lengths) / 3


@pytest.mark.parametrize("length", [1, 7, 19, 20])
def test_the_tokens_after_the_common_ones_are_read(length):
    generator = tiny()
    check_greedy(generator, [PROMPT], 5)
    other_token = (PROMPT[length % 20] + 1) % ARGS.vocab_size
    prompt = [*PROMPT[:length], other_token, *OTHER[:7]]
    assert tokens_read(generator, [prompt], 5, 0, logprobs=True) == 8
    check_greedy(generator, [prompt], 5)


def test_of_a_known_prompt_the_last_token_is_read():
    generator = tiny()
    check_greedy(generator, [PROMPT], 5)
    assert tokens_read(generator, [PROMPT], 5, 0) == 1
    assert tokens_read(generator, [PROMPT[:10]], 5, 0) == 1
    assert tokens_read(generator, [PROMPT], 5, 0) > 1


def test_an_answer_is_held_too():
    generator = tiny()
    answer, _ = expected(PROMPT, 6)
    stream = generator.stream_tokens(PROMPT, 0, max_gen_len=8)
    assert [next(stream) for _ in range(6)] == answer
    stream.close()
    assert tokens_read(generator, [[*PROMPT, *answer, 7]], 5, 0) <= 2
    check_greedy(generator, [[*PROMPT, *answer, 7]], 5)


def test_logits_are_equal():
    generator = tiny()
    logits, _ = generator._prefill([PROMPT + OTHER], logprobs=False)
    generator._prefill([PROMPT], logprobs=False)
    generator.model.sizes.clear()
    reused, _ = generator._prefill([PROMPT + OTHER], logprobs=False)
    assert generator.model.sizes == [(len(OTHER), 1)]
    torch.testing.assert_close(reused, logits, rtol=0, atol=1e-5)


def test_log_probabilities_with_echo_read_all():
    generator = tiny()
    check_greedy(generator, [PROMPT], 5)
    assert tokens_read(generator, [PROMPT], 5, 0, logprobs=True, echo=True) == len(PROMPT)


def batch(generator: Mixtral) -> None:
    generator.generate([OTHER, PROMPT], 2, 0)


def stream(generator: Mixtral) -> None:
    next(generator.stream_tokens(OTHER))


def other_generator(generator: Mixtral) -> None:
    Mixtral(generator.model, SimpleNamespace(eos_id=-1)).generate([OTHER], 2)


def router(generator: Mixtral) -> None:
    routing.route(generator.model, OTHER)


def the_model(generator: Mixtral) -> None:
    generator.model.forward(torch.tensor([OTHER]))


@pytest.mark.parametrize("write", [batch, stream, other_generator, router, the_model])
def test_whoever_writes_to_the_row_makes_it_forget(write):
    generator = tiny()
    check_greedy(generator, [PROMPT], 5)
    write(generator)
    assert tokens_read(generator, [PROMPT], 5, 0) == len(PROMPT)
    check_greedy(generator, [PROMPT], 5)


@pytest.mark.parametrize("write", [other_generator, router, the_model])
def test_a_stream_notices_that_its_cache_was_overwritten(write):
    generator = tiny()
    stream = generator.stream_tokens(PROMPT, 0)
    next(stream)
    write(generator)
    with pytest.raises(RuntimeError, match="the model was used between two tokens"):
        next(stream)


def test_after_the_last_token_a_stream_needs_its_cache_no_more():
    generator = tiny()
    stream = generator.stream_tokens(PROMPT, 0, max_gen_len=2)
    next(stream)
    last = next(stream)
    router(generator)
    assert list(stream) == []
    assert last == generator.generate([PROMPT], 2, 0)[0][0][1]


def test_an_interrupted_pass_is_not_relied_on(monkeypatch):
    generator = tiny()
    check_greedy(generator, [PROMPT], 5)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    layer = generator.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.generate([OTHER], 5, 0)
    assert tokens_read(generator, [PROMPT], 5, 0) == len(PROMPT)
    check_greedy(generator, [PROMPT], 5)


def test_several_ends():
    """The tokenizer's eos and those of the checkpoint's configs."""
    tokens, _ = expected(PROMPT, 10)
    model = random_transformer(ARGS)
    for first_end in range(3, 7):
        ends = [tokens[first_end], tokens[8]]
        generator = Mixtral(model, SimpleNamespace(eos_id=ends[0]), eos_ids=ends[1:])
        want = min(tokens.index(end) for end in ends)
        assert generator.generate([PROMPT], 10, 0)[0] == [tokens[:want]]
