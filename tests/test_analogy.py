"""spherization.py --task analogy: its questions, the layer in a block, words by their tokens, refusals.

A stand-in takes the place of transformers; what only the package can show is skipped without it.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import spherization as script
from spherization import answer_analogies, spherize, spherize_last_block

TINY = ["--task", "analogy", "--precision", "fp32", "--device", "cpu"]
CITIES = "Paris France Rome Italy Athens Greece Berlin Germany".split()
TEXT = "".join(f"The king lives in {a}, {b}.\n" for a, b in zip(CITIES[::2], CITIES[1::2], strict=True))
QUESTIONS = ": capital\nParis France Rome Italy\nAthens Greece Berlin Germany\nparis france berlin germany\n"


class Tokenizer:
    """Uncased. Words and commas are pieces; a word has a token for four letters and one for the rest."""

    cls_token_id, sep_token_id, mask_token_id, unk_token_id = range(4)
    is_fast = True

    def __init__(self):
        self.number = {"unhe": 3}

    def __call__(self, line, max_length, **_):
        pieces = enumerate(re.findall(r"\w+|[^\w\s]", line.lower()))
        tokens = [(i, part) for i, piece in pieces for part in (piece[:4], piece[4:]) if part][:max_length]
        numbers = [self.number.setdefault(part, len(self.number) + 4) for _, part in tokens]
        encoded = type("Encoded", (dict,), {"word_ids": lambda _: [i for i, _ in tokens]})
        return encoded(input_ids=numbers)


@pytest.fixture
def stand_in(monkeypatch):
    """What the stand-in for transformers loads, to be changed."""
    config = SimpleNamespace(hidden_size=64, max_position_embeddings=64)
    loads = SimpleNamespace(AutoTokenizer=Tokenizer(), AutoConfig=config, missing=[])

    def load_model():
        encoder = script.Encoder(200)
        encoder.places = nn.Parameter(0.1 * torch.randn(64, 64))
        encoder.config = config
        return encoder, {"missing_keys": loads.missing}

    package = SimpleNamespace(
        utils=SimpleNamespace(logging=SimpleNamespace(set_verbosity_error=lambda: None))
    )
    package.AutoModel = SimpleNamespace(from_pretrained=lambda *_, **__: load_model())
    for name in ("AutoTokenizer", "AutoConfig"):
        load = SimpleNamespace(from_pretrained=lambda *_, name=name, **__: getattr(loads, name))
        setattr(package, name, load)
    monkeypatch.setitem(sys.modules, "transformers", package)
    return loads


def write(folder, text=TEXT, questions=QUESTIONS):
    (folder / "text.txt").write_text(text)
    (folder / "questions.txt").write_text(questions)
    files = ["--text", str(folder / "text.txt"), "--analogies", str(folder / "questions.txt")]
    return [*TINY, "--model", "stand-in", *files]


def test_answers_are_their_definition():
    """3CosAdd, word by word in numpy, on vectors that answer some of the questions."""
    rng = np.random.default_rng(0)
    V = rng.normal(size=(8, 1, 12)) + rng.normal(size=(1, 3, 12)) + 0.55 * rng.normal(size=(8, 3, 12))
    V = V.reshape(-1, 12) * rng.uniform(0.5, 2, (24, 1))
    questions = [[3 * s, 3 * s + 1, 3 * t, 3 * t + 1] for s in range(8) for t in range(8) if s != t]
    u = V / np.linalg.norm(V, axis=1, keepdims=True)
    expected = []
    for a, b, c, d in questions:
        cos = {i: v @ (u[b] - u[a] + u[c]) for i, v in enumerate(u) if i not in (a, b, c)}
        expected.append(max(cos, key=cos.get) == d)
    assert answer_analogies(torch.from_numpy(V), torch.tensor(questions)).tolist() == expected
    assert 0.1 < np.mean(expected) < 0.9


def test_the_last_block_is_as_written():
    torch.manual_seed(0)
    encoder = script.Encoder(50).eval()
    first, last = encoder.blocks.layers
    W_2 = last.linear2.weight.detach().clone()
    spherize_last_block(encoder, radius=2.0, scale=3.0)
    assert isinstance(first.activation[0], nn.GELU) and first.linear2.bias is not None
    assert torch.equal(last.linear2.weight[:, :-1], W_2) and not last.linear2.weight[:, -1].any()
    nn.init.normal_(last.linear2.weight)  # so that the last coordinate counts too
    u = torch.randn(2, 5, 64)
    attention_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():  # where PyTorch would take its fused path
        a, _ = last.self_attn(u, u, u, key_padding_mask=~attention_mask)
        v = last.norm1(u + a)
        expected = last.norm2(v + spherize(last.linear1(v), 3.0, 2.0) @ last.linear2.weight.T)
        torch.testing.assert_close(last(u, src_key_padding_mask=~attention_mask), expected)
    with pytest.raises(ValueError, match="none of BERT"):
        spherize_last_block(nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])))


def test_punctuation_and_capitals_change_nothing(stand_in, tmp_path, capsys, no_figures):
    """By an uncased tokenizer these texts are one, and so are a word's spellings in the questions."""
    spaced = TEXT.replace(",", " ,").replace(".", " .")
    data = []
    for text in (TEXT, spaced, spaced.lower()):
        data.append(script.prepare_language(script.parse(write(tmp_path, text))))
        assert "3 questions of 8 words, of which 0 stand in no sentence" in capsys.readouterr().out
    assert data[0] == data[1] == data[2] and data[0].fingerprint == data[2].fingerprint
    done = script.main([*write(tmp_path), "--epochs", "1", "--out", str(tmp_path)])
    assert [result["chance"] for result in done["results"]] == [
        1 / 5
    ] * 3  # eight words, not twelve spellings


class Echo(nn.Module):
    """Hidden states that say which token of which place it is; input embeddings that say which token."""

    def get_input_embeddings(self):
        return lambda tokens: tokens[..., None].float()

    def forward(self, tokens, attention_mask):
        where = torch.arange(tokens.shape[1]).expand_as(tokens)
        return (torch.stack([tokens, where], 2).float(),)


@pytest.mark.parametrize("contexts, expected", [
    (0, [[25, 1.5], [40, 1]]), (1, [[25, 2.5], [40, 3]]), (2, [[25, (2.5 + 1.5) / 2], [40, 3]]),
])  # fmt: skip
def test_a_words_vector_is_the_mean_of_its_tokens_and_sentences(contexts, expected):
    x, ab, c = (7,), (20, 30), (40,)
    data = script.Language([[x, ab], [ab, x, x], [x, x, c], [(20, 31)]], [], 1, 2, 3)
    run = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))
    states, inputs = script.word_vectors(Echo(), [ab, c], contexts, data, run)
    assert states.tolist() == expected and inputs.tolist() == [[25], [40]]
    tokens, attention_mask, is_target = data.batch([[x, ab], [ab]], ab)
    assert tokens[attention_mask].tolist() == [1, 7, 20, 30, 2, 1, 20, 30, 2]
    assert is_target.tolist() == [[False, False, True, True, False], [False, True, True, False, False]]


def test_only_whole_words_within_the_encoders_positions_are_found(stand_in, tmp_path, capsys, no_figures):
    """`pari` begins Paris' token; the 62nd token of the long line begins a word, which is left out whole."""
    stand_in.AutoConfig.max_position_embeddings = 66
    argv = write(
        tmp_path, 61 * "a " + "Germany Paris\nParis Italy, kings\n", QUESTIONS + "pari rome king italy\n"
    )
    data = script.prepare_language(script.parse(argv))
    assert [sum(map(len, line)) for line in data.sentences] == [61, 7]
    assert "4 questions of 10 words, of which 8 stand in no sentence" in capsys.readouterr().out


def test_what_cannot_be_read_is_one_line(stand_in, tmp_path, user_error, monkeypatch):
    argv = write(tmp_path)
    missing = str(tmp_path / "nowhere.txt")

    def refused(flags, *words, argv=argv):
        with user_error(*words):
            script.main([*argv, "--out", str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()

    refused(["--text", missing], missing, "No such file")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(["--analogies", str(tmp_path / "bytes.txt")], "bytes.txt", "utf-8")
    refused(["--dataset", "mnist"], "--dataset", "--text")
    refused(["--text", missing], "--model", "together", argv=TINY)
    refused([], "--analogies", "four words", argv=write(tmp_path, questions="Paris Rome\n"))
    refused([], "--analogies", "no question", argv=write(tmp_path, questions="a b a c\nunheard a b c\n"))
    write(tmp_path)
    stand_in.missing = ["blocks.1"]
    refused([], "--model stand-in", "no weights for blocks.1")
    stand_in.missing = ["pooler.weight"]
    stand_in.AutoConfig.hidden_size = 128
    refused([], "--model stand-in", "sizes", "64", "128")
    stand_in.AutoTokenizer.is_fast = False
    refused([], "--model stand-in", "fast tokenizer")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    refused([], "--model stand-in", "transformers")


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet"])  # MiniLM is a BERT
def test_the_layer_goes_into_encoders_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(vocab_size=40, **sizes)
    )
    last = encoder.encoder.layer[1]
    spherize_last_block(encoder)
    seen = {}
    last.intermediate.dense.register_forward_hook(lambda _, u, z: seen.update(z=z))
    last.output.dense.register_forward_hook(lambda _, x, y: seen.update(x=x[0]))
    encoder(torch.randint(5, 40, (2, 6)))
    torch.testing.assert_close(seen["x"], spherize(seen["z"], 5.0))  # no GELU between them any more
    assert last.output.dense.bias is None


def test_a_folder_of_transformers_from_end_to_end(tmp_path, no_figures):
    """Tiny BERT with random weights, whose 64 positions hold 60 tokens, [CLS] and [SEP], and two more."""
    transformers = pytest.importorskip("transformers")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] pa ##ris , " + " ".join(CITIES[1:]).lower()
    (tmp_path / "vocab.txt").write_text(vocabulary.replace(" ", "\n"))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(15, 16, 2, 2, 32, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(tmp_path)
    argv = [*write(tmp_path, 40 * "Paris, " + "\n" + TEXT), "--model", str(tmp_path), "--epochs", "1"]
    data = script.prepare_language(script.parse(argv))
    assert data.sentences[0] == 20 * [(5, 6), (7,)]
    done = script.main([*argv, "--out", str(tmp_path / "out")])
    assert [result["epochs"] for result in done["results"]] == [0, 1, 1]
    assert Path(done["folder"]).name == f"text-{tmp_path.name}"
