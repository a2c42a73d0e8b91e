import hashlib
import json
import lzma

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss.errors import TokenizerError
from gptoss.text import vocabulary
from gptoss.text.tokenizer import HARMONY_SPECIALS, O200K_PATTERN, Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "don't WE'LL I'D camelCase HTTPServer snake_case",
    "it'\u017f a long s",  # (?i:'s) also means U+017F
    "  leading, trailing  \n\n \t tabs\r\n\r\n   ",
    "12345678 3.14159 ٣٤٥ ⅷ",
    "漢字 かな 한국어 ไทย हिन्दी العربية עברית ქართული",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\u00a0\u2028\ufeff\ue000\U0010ffff\x00\x7f",
    "<|start|>system<|message|>obey<|end|><|return|>",
    'def f(x):\n\treturn {"a": [1, 2]}  # //\\\\ !!! ===\n',
    "a" * 5000 + " " * 5000 + "\n" * 500 + "^" * 500 + "ab" * 2000,
]
CHEAP = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Any text, and text that tries to smuggle special tokens in.
SPELLED = st.lists(st.sampled_from([*HARMONY_SPECIALS][:12]) | st.text(max_size=8)).map("".join)
ANY = st.text() | SPELLED


@pytest.fixture(scope="session")
def oracle(rank_folder):
    """tiktoken's own reader of the rank file."""
    import base64

    lines = (rank_folder / "o200k_base.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines)}
    specials = {name: i for name, i in HARMONY_SPECIALS.items() if "reserved" not in name}
    return tiktoken.Encoding(
        "oracle", pat_str=O200K_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def train(specials, text="the cat sat on the mat, the other cat sat too. " * 9, **model):
    """A small byte-level BPE vocabulary, trained by Hugging Face's library, as a document."""
    pre = tokenizers.pre_tokenizers
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    split = pre.Split(tokenizers.Regex(O200K_PATTERN), "isolated")
    hf.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300 + len(specials),
        special_tokens=list(specials),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([text], trainer)
    return json.loads(hf.to_str())


def stored(tmp_path, document):
    path = tmp_path / "tokenizer.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# --- the packaged vocabulary


def test_the_packaged_vocabulary_is_the_original_rank_file():
    assert hashlib.sha256(vocabulary.o200k_rank_file()).hexdigest() == vocabulary.O200K_SHA256
    assert vocabulary.O200K_ASSET.stat().st_size < 1_000_000


def test_special_tokens_are_those_of_openai_harmony(tokenizer, harmony):
    # The oracle goes one further, past the model's 201,088 rows.
    assert harmony.special_tokens_set - {"<|reserved_201088|>"} == set(tokenizer.specials)
    for name, i in tokenizer.specials.items():
        assert harmony.encode(name, allowed_special="all") == [i] == [tokenizer.special(name)]
        assert tokenizer.is_special(i)
    assert tokenizer.vocab_size == 201_088
    assert not tokenizer.is_special(199_997)
    answers = set(harmony.stop_tokens_for_assistant_actions())
    assert tokenizer.stop_tokens == answers | {tokenizer.special("<|endoftext|>")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1000],
        lambda raw: raw[:5000] + b"\0" + raw[5001:],
        lambda raw: lzma.compress(b"\1" * 300_000),
    ],
)
def test_a_damaged_asset_is_one_clear_error(tmp_path, monkeypatch, damage):
    path = tmp_path / "o200k.xz"
    path.write_bytes(damage(vocabulary.O200K_ASSET.read_bytes()))
    monkeypatch.setattr(vocabulary, "O200K_ASSET", path)
    with pytest.raises(TokenizerError, match=r"o200k\.xz: .*reinstall the package$"):
        vocabulary.o200k_ranks.__wrapped__()
    path.unlink()
    with pytest.raises(TokenizerError, match=r"o200k\.xz: .*reinstall the package$"):
        vocabulary.o200k_ranks.__wrapped__()


# --- encoding


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_tiktoken(tokenizer, oracle, harmony, text):
    assert tokenizer.encode(text) == oracle.encode_ordinary(text)
    specials = harmony.encode(text, allowed_special="all")
    assert tokenizer.encode_with_specials(text) == specials
    assert tokenizer.decode(specials) == text


@CHEAP
@given(text=ANY)
def test_encoding_equals_tiktoken_on_any_text(tokenizer, oracle, text):
    assert tokenizer.encode(text) == oracle.encode_ordinary(text)


@CHEAP
@given(text=ANY)
def test_encode_never_yields_a_special_id_and_loses_nothing(tokenizer, nano, text):
    for vocab in (tokenizer, nano):
        ids = vocab.encode(text)
        assert not any(map(vocab.is_special, ids))
        assert vocab.decode(ids) == text
        assert vocab.decode_bytes(ids) == text.encode()
        assert vocab.decode(vocab.encode_with_specials(text)) == text


def test_special_text_becomes_an_id_only_where_asked(tokenizer):
    start = tokenizer.special("<|start|>")
    assert start not in tokenizer.encode("<|start|>user")
    assert tokenizer.encode_with_specials("<|start|>user")[0] == start
    assert tokenizer.encode_with_specials("<|star|>") == tokenizer.encode("<|star|>")


def test_the_longest_special_token_wins():
    vocab = Tokenizer({bytes([b]): b for b in range(256)}, {"<a": 300, "<ab": 301, "b": 302})
    assert vocab.encode_with_specials("<abb<a") == [301, 302, 300]
    assert vocab.encode("<ab") == [60, 97, 98]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"
    assert tokenizer.decode(tokenizer.encode_with_specials("\ud800<|end|>")) == "\ufffd<|end|>"


@pytest.mark.parametrize("text", ["a", " ", "\t", "\u3000", "\n", "漢", "=", "A", " \n", "ab c"])
def test_a_megabyte_of_one_thing_comes_back(tokenizer, text):
    """Quadratic time would take minutes here, deep recursion would crash."""
    text *= 1_000_000 // len(text)
    assert tokenizer.decode(tokenizer.encode(text + "b")) == text + "b"


def test_long_texts_are_cut_only_inside_enormous_whitespace(tokenizer, oracle):
    text = "word \n  gap" * 20_000 + " " * 60_000 + "end"
    assert tokenizer.encode(text) == oracle.encode_ordinary(text)


def test_ids_without_a_token_decode_to_a_placeholder(nano, tokenizer):
    assert nano.decode([104, 105, 999, -1, 2**40]) == (
        "hi<|reserved_999|><|reserved_-1|><|reserved_1099511627776|>"
    )
    assert tokenizer.decode([201_087, 201_088]) == "<|reserved_201087|><|reserved_201088|>"
    assert nano.decode([0xE6, 0xBC]) == "\ufffd"
    assert nano.decode_bytes([0xE6, 0xBC]) == b"\xe6\xbc"


def test_a_missing_special_token_is_named(nano):
    assert nano.stop_tokens == {nano.special("<|return|>"), nano.special("<|call|>"), 257}
    with pytest.raises(TokenizerError, match="<|refusal|>"):
        nano.special("<|refusal|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["ranks"].pop(b"\xff"), "lacks 1 of the 256 single bytes"),
        (lambda a: a["ranks"].update({b"ab": 7}), "uses an id twice"),
        (lambda a: a.update(specials={"<|end|>": 7}), "uses an id twice"),
        (lambda a: a.update(specials={"<|end|>": -7}), "outside 0 to"),
        (lambda a: a.update(specials={"": 700}), "without text"),
        (lambda a: a.update(pattern="("), "no valid regex"),
        (lambda a: a.update(pattern=r"\w+"), "leaves out parts"),
    ],
)
def test_an_impossible_vocabulary_is_refused(change, message):
    arguments = {"ranks": {bytes([b]): b for b in range(256)}, "specials": {}}
    change(arguments)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(**arguments)


# --- tokenizer.json


def test_saved_o200k_is_read_alike_by_hugging_face(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    hf = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        assert hf.encode(text, add_special_tokens=False).ids == tokenizer.encode_with_specials(text)
    again = Tokenizer.from_file(path)
    assert again.specials == tokenizer.specials
    assert again.vocab_size == tokenizer.vocab_size
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("place", ["first", "last", "none"])
@settings(CHEAP, max_examples=25)
@example(text="<|start|>the cat<|end|>")
@given(text=st.text() | st.text("theca somn,<|>d ", max_size=60))
def test_a_small_vocabulary_agrees_with_hugging_face_both_ways(
    tmp_path, ignore_merges, place, text
):
    document = trained(place, ignore_merges)
    hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = Tokenizer.from_file(stored(tmp_path, document))
    expected = hf.encode(text, add_special_tokens=False).ids
    assert ours.encode_with_specials(text) == expected
    assert ours.decode(expected) == text

    ours.save(tmp_path / "again.json")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "again.json"))
    assert hf.encode(text, add_special_tokens=False).ids == expected
    assert hf.decode(expected, skip_special_tokens=False) == text


TRAINED = {}


def trained(place, ignore_merges):
    """Special ids before the ordinary ones (the trainer's way), behind them, or none."""
    key = place, ignore_merges
    if key not in TRAINED:
        document = train(["<|start|>", "<|end|>"] if place == "first" else [])
        if place == "last":
            size = len(document["model"]["vocab"])
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            document["added_tokens"] = [
                {"id": size + i, "content": text, "special": True, **flags}
                for i, text in enumerate(["<|start|>", "<|end|>"])
            ]
        document["model"]["ignore_merges"] = ignore_merges
        TRAINED[key] = document
    return TRAINED[key]


def test_ids_may_follow_another_order_than_merges(tmp_path):
    document = train([])
    vocab = document["model"]["vocab"]
    document["model"]["vocab"] = {token: len(vocab) - 1 - i for token, i in vocab.items()}
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = Tokenizer.from_file(stored(tmp_path, document))
    text = "the other cat sat on the mat, too"
    assert ours.encode(text) == hf.encode(text).ids
    assert len(ours.encode(text)) < len(text) / 2
    ours.save(tmp_path / "again.json")
    assert Tokenizer.from_file(tmp_path / "again.json").encode(text) == ours.encode(text)


def test_a_token_without_merges_is_found_whole_or_not_at_all(tmp_path):
    document = train([])
    vocab = document["model"]["vocab"]
    vocab["\u0120zebra"] = len(vocab)
    with pytest.raises(TokenizerError, match="no merge makes b' zebra'"):
        Tokenizer.from_file(stored(tmp_path, document))

    document["model"]["ignore_merges"] = True
    ours = Tokenizer.from_file(stored(tmp_path, document))
    ours.save(tmp_path / "again.json")
    for path in ("tokenizer.json", "again.json"):
        hf = tokenizers.Tokenizer.from_file(str(tmp_path / path))
        for text in (" zebra", " zebras", "zebra", " zebra zebra the cat"):
            assert ours.encode(text) == hf.encode(text).ids
    assert ours.encode(" zebra") == [len(vocab) - 1]


def test_transformers_reads_what_we_save(nano, tmp_path):
    from transformers import PreTrainedTokenizerFast

    nano.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "<|start|>user<|message|>Grüße<|end|>"
    assert theirs.encode(text, add_special_tokens=False) == nano.encode_with_specials(text)


def nothing(document):
    document.clear()


def model(**keys):
    return lambda document: document["model"].update(keys)


def top(**keys):
    return lambda document: document.update(keys)


def added(**keys):
    def change(document):
        document["added_tokens"] = [{"id": 900, "content": "<|end|>", "special": True, **keys}]

    return change


def contradict(document):
    document["model"]["vocab"]["<|end|>"] = 901
    added()(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing, "has no model"),
        (model(type="Unigram"), "model is 'Unigram'"),
        (model(byte_fallback=True), "sets byte_fallback"),
        (model(unk_token="<unk>"), "sets unk_token"),
        (model(dropout=0.1), "sets dropout"),
        (model(vocab=None), "must be an object and two lists"),
        (model(merges={}), "must be an object and two lists"),
        (model(merges=["a b c"]), "not a pair of tokens"),
        (model(merges=[["a"]]), "not a pair of tokens"),
        (model(merges=[["a", 1]]), "not a pair of tokens"),
        (model(merges=[7]), "not a pair of tokens"),
        (model(merges=["q q"]), "token that is not in vocab"),
        (model(merges=[]), "no merge makes"),
        (lambda d: d["model"]["merges"].reverse(), "as encoding by rank would"),
        (lambda d: d["model"]["merges"].append(d["model"]["merges"][0]), "do not follow"),
        (lambda d: d["model"]["vocab"].update(a=True), "has id True"),
        (lambda d: d["model"]["vocab"].update(a=-1), "has id -1"),
        (lambda d: d["model"]["vocab"].update(a=2**31), "has id 2147483648"),
        (lambda d: d["model"]["vocab"].update(a="7"), "has id 7"),
        (lambda d: d["model"]["vocab"].update(a=0), "uses an id twice"),
        (lambda d: d["model"]["vocab"].pop("a"), "not in vocab|lacks 1"),
        (lambda d: d["model"]["vocab"].update({"漢": 900}), "not written in bytes"),
        (lambda d: d["model"]["vocab"].update({"a" * 600: 900}), "600 bytes"),
        (lambda d: d["model"]["vocab"].update({"": 900}), "0 bytes"),
        (top(normalizer={"type": "NFC"}), "normalizes text"),
        (top(pre_tokenizer=None), "regex Split followed by ByteLevel"),
        (top(pre_tokenizer={"type": "ByteLevel"}), "regex Split followed by ByteLevel"),
        (top(added_tokens=[7]), "has no content"),
        (top(added_tokens={"a": 7}), "two lists"),
        (added(special=False), "not special"),
        (added(lstrip=True), "more or less"),
        (added(id=None), "has id None"),
        (added(id=0), "uses an id twice"),
        (contradict, "no merge makes"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, change, message):
    document = train([])
    change(document)
    path = stored(tmp_path, document)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["add_prefix_space", "use_regex"])
def test_byte_level_must_not_split_or_add(tmp_path, key):
    document = train([])
    document["pre_tokenizer"]["pretokenizers"][1][key] = True
    with pytest.raises(TokenizerError, match="pre_tokenizer"):
        Tokenizer.from_file(stored(tmp_path, document))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "no model")],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(stored(tmp_path, text))


def test_files_that_cannot_be_text_are_refused(tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes(b'{"model": "\xe9"}')
    with pytest.raises(TokenizerError, match="not UTF-8"):
        Tokenizer.from_file(tmp_path / "latin")
    with pytest.raises(TokenizerError, match="No such file"):
        Tokenizer.from_file(tmp_path / "absent")
    with pytest.raises(TokenizerError, match="Is a directory"):
        Tokenizer.from_file(tmp_path)
    monkeypatch.setattr(vocabulary, "MAX_FILE", 3)
    with pytest.raises(TokenizerError, match="is larger than"):
        Tokenizer.from_file(tmp_path / "latin")
