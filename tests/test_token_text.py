"""The text of tokens, with every kind of decoder: the whole is what the tokenizer decodes, and so are its parts."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism_refactor.server.answers import Answer, TokenText, chat_logprobs, completion_logprobs
from prism_refactor.serving.engine import Logprob

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = ["A heron stands in the shallow water, still, and waits for the fish. Reeds bend; caf\u00e9 lights shine."] * 20
HALF = "\ufffd"


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return tokenizer


def byte_fallback(strip=True):
    """As Llama's, Mixtral's; without `strip` as Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    words = [f"<0x{byte:02X}>" for byte in range(256)]
    # Bytes have a vocabulary's place, and are no added tokens.
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    vocabulary = tokenizer.get_vocab()
    merges = []
    vocabulary |= {word: len(vocabulary) + number for number, word in enumerate(words)}
    rebuilt = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rebuilt.normalizer = tokenizer.normalizer
    rebuilt.add_special_tokens(SPECIAL)
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    rebuilt.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return rebuilt


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, no strip": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word piece": word_piece,
}


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    found = KINDS[request.param]()
    found.add_tokens([AddedToken("<call>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def draws(tokenizer, count=600):
    """Random token ids; not beginning with a byte that is a space, which no tokenizer makes of a text."""
    rng, most = random.Random(3), len(tokenizer)
    for _ in range(count):
        tokens = [rng.randrange(most) for _ in range(rng.randrange(1, 16))]
        if "<0x20>" not in tokenizer.convert_ids_to_tokens(tokens):
            yield tokens, rng.randrange(len(tokens))


def decode(tokenizer, tokens):
    return tokenizer.backend_tokenizer.decode(tokens)


def text_of(tokenizer, tokens, before=()):
    answer = Answer(tokenizer, (), before)
    return "".join(answer.add([token], False) for token in tokens) + answer.add([], True)


def test_a_text_is_what_the_tokenizer_decodes(tokenizer):
    """Token by token, whatever the bytes are: half characters become U+FFFD."""
    for tokens, _ in draws(tokenizer):
        assert text_of(tokenizer, tokens) == decode(tokenizer, tokens), tokenizer.convert_ids_to_tokens(tokens)


def test_a_text_goes_on_after_its_prompt(tokenizer):
    """With the space that stands between."""
    for tokens, cut in draws(tokenizer):
        whole, prompt = decode(tokenizer, tokens), decode(tokenizer, tokens[:cut])
        if HALF not in whole and HALF not in prompt:
            assert prompt + text_of(tokenizer, tokens[cut:], tokens[:cut]) == whole


def test_a_text_behind_some_other_keeps_its_first_space(tokenizer):
    whole = tokenizer("heron stands", add_special_tokens=False).input_ids
    first = tokenizer("heron", add_special_tokens=False).input_ids
    assert whole[: len(first)] == first
    answer = Answer(tokenizer)
    assert decode(tokenizer, first) + answer.add(whole[len(first) :], True) == decode(tokenizer, whole)


def test_tokens_join_to_the_text_and_offsets_point_to_them(tokenizer):
    for tokens, cut in draws(tokenizer):
        prompt, rest = tokens[:cut], tokens[cut:]
        text = text_of(tokenizer, rest, prompt)
        found = completion_logprobs(tokenizer, rest, [Logprob(-1.0, []) for _ in rest], prompt)
        special = [name in SPECIAL for name in found["tokens"]]
        assert "".join(name for name, skipped in zip(found["tokens"], special, strict=True) if not skipped) == text
        for name, offset, skipped in zip(found["tokens"], found["text_offset"], special, strict=True):
            assert skipped or text[offset:].startswith(name)


def test_so_do_the_parts_of_a_stream(tokenizer):
    for tokens, cut in draws(tokenizer):
        answer, tokens_told, text = Answer(tokenizer, (), ()), [], ""
        for part, last in ((tokens[:cut], False), (tokens[cut:], True)):
            offset = answer.characters
            before = list(answer.tokens)
            text += answer.add(part, last)
            found = completion_logprobs(tokenizer, part, [Logprob(-1.0, []) for _ in part], before, offset, last)
            tokens_told += zip(found["tokens"], found["text_offset"], strict=True)
        if HALF not in text:
            told = [(name, offset) for name, offset in tokens_told if name not in SPECIAL]
            assert "".join(name for name, _ in told) == text
            assert all(text[offset:].startswith(name) for name, offset in told)


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    for tokens, cut in draws(tokenizer):
        prompt, rest = tokens[:cut], [token for token in tokens[cut:] if token not in tokenizer.all_special_ids]
        text = text_of(tokenizer, rest, prompt)
        content = chat_logprobs(tokenizer, rest, [Logprob(-1.0, []) for _ in rest], prompt)["content"]
        if HALF not in text and HALF not in decode(tokenizer, prompt):
            assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text


def test_names_of_candidates_differ(tokenizer):
    """Of all tokens, anywhere: nothing is lost where they are keys."""
    for before in ([], [5], [len(tokenizer) - 2]):
        top = [(token, -1.0) for token in range(len(tokenizer) + 3)]
        found = completion_logprobs(tokenizer, [5], [Logprob(-1.0, top)], before)
        assert len(found["top_logprobs"][0]) == len(top)


@pytest.mark.parametrize("tokenizer", ["byte level", "byte fallback", "byte fallback, no strip"], indirect=True)
def test_a_character_of_several_tokens(tokenizer):
    """It is told with its last token; cut, it is U+FFFD."""
    tokens = tokenizer("\u9dfa", add_special_tokens=False).input_ids
    assert decode(tokenizer, tokens).strip() == "\u9dfa"
    answer = Answer(tokenizer, (), tokens)
    # Not before it is clear that nothing follows that belongs to it.
    assert "".join(answer.add([token], False) for token in tokens[:-1]).strip() == ""
    assert (answer.add(tokens[-1:], False) + answer.add([], True)).strip() == "\u9dfa"
    assert text_of(tokenizer, tokens[:-1]).strip() == decode(tokenizer, tokens[:-1]).strip()
    assert HALF in text_of(tokenizer, tokens[:-1])


def test_a_long_run_of_byte_tokens_is_told_on_the_way():
    """Of a script that the vocabulary does not have: what is whole is told after 32 bytes, and nothing is cut."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), unk_token="<unk>")
    text = "\u0f56\u0f7c\u0f51" * 20
    tokens = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    answer = Answer(tokenizer, (), ())
    told = [answer.add([token], False) for token in tokens]
    assert sum(map(bool, told)) >= 4
    assert "".join(told) + answer.add([], True) == text
    assert "".join(TokenText(tokenizer).pieces(tokens, last=True)) == text


def test_a_text_after_a_long_run_of_byte_tokens():
    """However many of the prompt's last tokens are bytes, and wherever the text begins among them."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), unk_token="<unk>")
    text = "\u0f56\u0f7c\u0f51x" * 2 + "\u0f56\u0f7c\u0f51" * 20 + "s"
    tokens = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    tokens[-1] = tokenizer.convert_tokens_to_ids("s")
    for cut in range(0, len(tokens) - 1):
        rest = text[len(text.encode()[:cut].decode(errors="ignore")) :]
        assert text_of(tokenizer, tokens[cut:], tokens[:cut]) == rest
        pieces = TokenText(tokenizer, tokens[:cut]).pieces(tokens[cut:], last=True)
        assert "".join(pieces) == rest
        # Each character is told with the last of its tokens, also where the run is long.
        assert max(map(len, pieces)) <= 1


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(tokenizer):
    """A model may have more embeddings than its tokenizer has tokens."""
    beyond = len(tokenizer) + 7
    first, second = tokenizer("heron water", add_special_tokens=False).input_ids[:2]
    assert text_of(tokenizer, [first, beyond, second]) == decode(tokenizer, [first, second])
    assert completion_logprobs(tokenizer, [beyond], [Logprob(-1.0, [])])["tokens"] == [""]
