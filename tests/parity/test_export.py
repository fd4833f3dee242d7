"""The tokenizer files of an export say the same as the tokenizer they were made from."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protomamba.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from protomamba.errors import UserError
from protomamba.export import byte_alphabet, byte_tokenizer_json, tokenizer_files

tokenizers = pytest.importorskip("tokenizers")
AS_BYTES = tokenizers.Tokenizer.from_str(byte_tokenizer_json(256))


@given(st.text())
def test_bytes_in_bytes_out(text):
    """Any text without the literal name of the end token, which the library reads as that token."""
    ids = AS_BYTES.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode()) or "<|endoftext|>" in text
    assert AS_BYTES.decode(ids) == text


def test_the_end_of_a_document_is_a_special_token():
    assert AS_BYTES.token_to_id("<|endoftext|>") == 256
    assert AS_BYTES.decode([104, 105, 256]) == "hi"
    assert AS_BYTES.get_vocab_size(with_added_tokens=True) == 257
    assert tokenizers.Tokenizer.from_str(byte_tokenizer_json(None)).get_vocab_size() == 256


def test_the_alphabet_is_the_library_s():
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def trained(special):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[special], show_progress=False)
    tokenizer.train_from_iterator(["to be or not to be"] * 5, trainer)
    return tokenizer


def test_a_trained_tokenizer_travels_unchanged():
    library = trained("</s>")
    ours = HuggingFaceTokenizer(library.to_str(), library.token_to_id("</s>"))
    files = tokenizer_files(ours.to_json())
    assert files["tokenizer.json"] == library.to_str()
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    assert json.loads(files["special_tokens_map.json"]) == {"eos_token": "</s>"}


def test_no_end_of_document_no_special_token():
    files = tokenizer_files(ByteTokenizer(None).to_json())
    assert json.loads(files["special_tokens_map.json"]) == {}
    assert "eos_token" not in json.loads(files["tokenizer_config.json"])


def test_unigram_vocabularies_are_lists():
    model = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0]]}, "added_tokens": []}
    description = {"kind": "huggingface", "eos": 1, "tokenizer": json.dumps(model)}
    assert json.loads(tokenizer_files(json.dumps(description))["special_tokens_map.json"]) == {"eos_token": "</s>"}
    with pytest.raises(UserError, match="has no token 9"):
        tokenizer_files(json.dumps({**description, "eos": 9}))
