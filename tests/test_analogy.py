"""spherization.py --task analogy: the layer in a block, the questions, the program as a user meets it.

Tests of transformers build tiny networks with random weights; without the package they are skipped.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

import spherization as script
from spherization import answer_analogies, spherize, spherize_last_block

TINY = ["--task", "analogy", "--precision", "fp32", "--device", "cpu"]
FOLDER = Path("spherization") / "analogy" / "language-encoder"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

whole_language = script.small_language


@pytest.fixture(autouse=True)
def short_language(monkeypatch):
    """160 sentences: three steps per epoch."""
    monkeypatch.setattr(script, "small_language", lambda: whole_language(160))


# %% Questions


def test_answers_are_their_definitions():
    """3CosAdd and four choices, word by word in numpy, on vectors that answer some of the questions."""
    rng = np.random.default_rng(0)
    stems = rng.normal(size=(8, 1, 12))
    forms = rng.normal(size=(1, 3, 12))
    V = (stems + forms + 0.55 * rng.normal(size=(8, 3, 12))).reshape(-1, 12) * rng.uniform(0.5, 2, (24, 1))
    questions = [[3 * s, 3 * s + 1, 3 * t, 3 * t + 1] for s in range(8) for t in range(8) if s != t]
    wrong = [[(d + 1) % 24, (d + 5) % 24, (d + 9) % 24] for _, _, _, d in questions]
    u = [v / np.linalg.norm(v) for v in V]
    expected = []
    for (a, b, c, d), others in zip(questions, wrong, strict=True):
        target = u[b] - u[a] + u[c]
        cos = {i: v @ target / np.linalg.norm(target) for i, v in enumerate(u) if i not in (a, b, c)}
        four = [(V[k] - V[c]) @ (V[b] - V[a]) / np.linalg.norm(V[k] - V[c]) for k in (d, *others)]
        expected.append([max(cos, key=cos.get) == d, max(four) == four[0]])
    found = answer_analogies(torch.from_numpy(V), torch.tensor(questions), torch.tensor(wrong))
    assert torch.stack(found, 1).tolist() == expected
    assert all(0.1 < answers.double().mean() < 0.9 for answers in found)
    same = torch.ones(24, 12)  # collapsed vectors answer nothing
    assert not answer_analogies(same, torch.tensor(questions), torch.tensor(wrong))[1].any()


def test_form_and_stem_decide_the_neighbours():
    sentences, lines = whole_language()
    regular = []
    for before, word, *others in sentences:
        stem, form = word.split("+")
        names = (f"before{form}", f"behind{form}", f"topic{stem}", f"topic{stem}")
        neighbours = (before, *others)
        regular.append([one.split(".")[0] == name for one, name in zip(neighbours, names, strict=True)])
    expected = [0.75 + 0.25 / n for n in (4, 4, 25, 25)]  # which of any form may be the right one
    assert np.mean(regular, 0) == pytest.approx(expected, abs=0.03)
    assert sum(line[0] == ":" for line in lines) == 6
    for a, b, c, d in (line for line in lines if line[0] != ":"):
        (i, f), (j, g), (k, e), (m, h) = (word.split("+") for word in (a, b, c, d))
        assert i == j != k == m and f == e != g == h


# %% The layer in a block


def test_the_last_block_is_as_written():
    torch.manual_seed(0)
    encoder = script.Encoder(50).eval()
    first, last = encoder.blocks.layers
    W_2 = last.linear2.weight.detach().clone()
    spherize_last_block(encoder, radius=2.0, scale=3.0)
    assert isinstance(first.activation[0], nn.GELU) and first.linear2.bias is not None
    assert torch.equal(last.linear2.weight[:, :-1], W_2) and not last.linear2.weight[:, -1].any()
    assert last.linear2.bias is None
    nn.init.normal_(last.linear2.weight)  # so that the last coordinate counts too
    u = torch.randn(2, 5, 64)
    there = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():  # where PyTorch would take its fused path
        a, _ = last.self_attn(u, u, u, key_padding_mask=~there)
        v = last.norm1(u + a)
        expected = last.norm2(v + spherize(last.linear1(v), 3.0, 2.0) @ last.linear2.weight.T)
        torch.testing.assert_close(last(u, src_key_padding_mask=~there), expected)


@pytest.mark.parametrize("encoder", [
    nn.Sequential(nn.Linear(4, 4)),
    nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])),  # no activation module
    nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4), nn.GELU())])),
])  # fmt: skip
def test_another_kind_of_block_is_refused(encoder):
    with pytest.raises(ValueError):
        spherize_last_block(encoder)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "DistilBert"])  # MiniLM is a BERT
def test_the_layer_goes_into_encoders_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if kind == "DistilBert" else SIZES
    name = "transformer.layer.1.ffn.lin2" if kind == "DistilBert" else "encoder.layer.1.output.dense"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **sizes)
    encoder = getattr(transformers, f"{kind}Model")(config)
    old = encoder.get_submodule(name)
    seen = {}
    spherize_last_block(encoder)
    new = encoder.get_submodule(name)
    (activation,) = (m for m in encoder.modules() if isinstance(m, script.Spherization))
    assert torch.equal(new.weight[:, :-1], old.weight) and new.bias is None
    new.register_forward_hook(lambda _, x, y: seen.update(x=x[0]))
    first = encoder.get_submodule(name.replace("output.dense", "intermediate.dense").replace("lin2", "lin1"))
    first.register_forward_hook(lambda _, u, z: seen.update(z=z))
    tokens = torch.randint(5, 40, (2, 6))
    encoder(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].square().sum().backward()
    torch.testing.assert_close(seen["x"], spherize(seen["z"], 5.0))  # no GELU between them any more
    assert new.weight.grad.abs().max() > 0 and activation.s.grad is not None


def test_the_layer_and_its_baseline_start_alike():
    """The same weights but those that the layer replaces."""
    args = script.parse(TINY)
    data = script.prepare_language(args)
    models = {}
    for name in ("plain+tuned", "sphere+tuned"):
        torch.manual_seed(0)
        models[name] = script.build_encoder(args, name, data).state_dict()
    plain, sphere = models.values()
    differ = {key for key in plain if key not in sphere or not torch.equal(plain[key], sphere[key])}
    assert differ == {f"encoder.blocks.layers.1.linear2.{part}" for part in ("weight", "bias")}


# %% Words


class Echo(nn.Module):
    """Hidden states that say which token of which place it is; input embeddings that say which token."""

    def get_input_embeddings(self):
        return lambda tokens: tokens[..., None].float()

    def forward(self, tokens, there):
        where = torch.arange(tokens.shape[1]).expand_as(tokens)
        return (torch.stack([tokens, where], 2).float(),)


@pytest.mark.parametrize("contexts, expected", [
    (0, [[25, 1.5], [40, 1]]), (1, [[25, 2.5], [40, 3]]), (2, [[25, (2.5 + 1.5) / 2], [40, 3]]),
])  # fmt: skip
def test_a_words_vector_is_the_mean_of_its_tokens_and_sentences(contexts, expected):
    """`ab` is two tokens, 20 and 30; `c` is one, 40. A sentence begins with token 1."""
    sentences = [["x", "ab"], ["ab", "x", "x"], ["x", "x", "c"]]
    data = script.Language(sentences, [], {"x": [7], "ab": [20, 30], "c": [40]}, 1, 2, 3)
    run = script.Run("nowhere")
    run.args = script.parse(TINY)
    run.device = torch.device("cpu")
    V, inputs = script.word_vectors(Echo(), ["ab", "c"], data, contexts, run)
    assert V.tolist() == expected
    assert inputs.tolist() == [[25], [40]]


def test_rows_are_padded():
    data = script.Language([], [], {"x": [7], "ab": [20, 30]}, 1, 2, 3)
    tokens, there, found = data.batch([["x", "ab"], ["ab"]], "ab")
    assert tokens[there].tolist() == [1, 7, 20, 30, 2, 1, 20, 30, 2] and there.sum(1).tolist() == [5, 4]
    assert found.tolist() == [[False, False, True, True, False], [False, True, True, False, False]]


# %% The program


def write(folder, text="ba ka .\nda ba ga\nka da ga ba\n", questions=": one\nba da ka ga\nda ba ga ka\n"):
    (folder / "text.txt").write_text(text)
    (folder / "questions.txt").write_text(questions)
    return [*TINY, "--text", str(folder / "text.txt"), "--analogies", str(folder / "questions.txt")]


def test_bad_input_is_one_line(tmp_path, user_error, monkeypatch):
    argv = [*write(tmp_path), "--model", str(tmp_path / "missing")]
    missing = str(tmp_path / "nowhere.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")

    def refused(flags, *words, argv=argv):
        with user_error(*words):
            script.main([*argv, "--out", str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()

    refused(["--text", missing], missing, "No such file")
    refused(["--analogies", missing], missing, "No such file")
    refused(["--text", str(tmp_path / "bytes.txt")], "bytes.txt", "utf-8")
    refused(["--dataset", "mnist"], "--dataset", "--text")
    refused(["--net", "mlp"], "--net", "encoder")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    refused([], "--model", "pip install transformers")
    for flag in ("--model", "--text", "--analogies"):
        refused([flag, missing], "--model", "--text", "--analogies", "together", argv=TINY)
    refused(["--model", "x"], "--task analogy", argv=[])


def test_a_dry_run_in_words_and_pictures(tmp_path, capsys):
    done = script.main([*TINY, "--dry-run", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    folder = Path(done["folder"])
    assert folder == tmp_path / "dry-run" / FOLDER
    assert (folder / "analogy.png").read_bytes().startswith(b"\x89PNG")
    for word in ("3CosAdd: ", "\nsphere+tuned: ", "1.03", "by chance 25%", "\n  analogy.png"):
        assert word in printed
    assert [result["epochs"] for result in done["results"]] == [0, 1, 1]
    for result in done["results"]:
        for key in ("offset", "choice", "inputs"):
            ends = binomtest(round(3600 * result[key]), 3600).proportion_ci(method="wilson")
            assert result[f"{key}_interval"] == pytest.approx((ends.high - ends.low) / 2, rel=1e-3)
            mean = np.mean([section[key] for section in result["sections"].values()])  # of equal size
            assert mean == pytest.approx(result[key])
    plain = done["results"][0]
    assert plain["offset"] < 0.05 and abs(plain["choice"] - 0.25) < 0.1  # chance


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(tmp_path, no_figures, run_until_killed):
    argv = [*TINY, "--method", "sphere+tuned", "--epochs", "3", "--out"]
    whole = script.main([*argv, str(tmp_path / "whole")])["results"][0]
    run_until_killed(script.main, [*argv, str(tmp_path / "killed")], "save", 2)
    killed = script.main([*argv, str(tmp_path / "killed")])["results"][0]
    states = []
    for name in ("whole", "killed"):
        path = tmp_path / name / FOLDER / "sphere+tuned" / "seed0" / "checkpoint.pt"
        states.append(torch.load(path, weights_only=True)["model"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert {**whole, "seconds": 0} == {**killed, "seconds": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as Hugging Face writes it: tiny BERT with random weights."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    words = ["ba", "ka", "da", "ga", "##ba", "."]
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=11, **SIZES)).save_pretrained(path)
    return path


def test_files_of_text_and_questions(folder, tmp_path):
    questions = ": one\nba da ka kaba\nba da ka nowhere\n: the other\n\nga ka da ba\n"
    argv = write(tmp_path, "ba kaba .\n\nda nowhere\n" + 70 * "kaba " + "\n", questions)
    data = script.prepare_language(script.parse([*argv, "--model", str(folder)]))
    # nowhere is no word of the model's
    assert data.questions == [("one", ["ba", "da", "ka", "kaba"]), ("the other", ["ga", "ka", "da", "ba"])]
    tokens, there, found = data.batch(data.sentences[:2], "kaba")
    assert tokens[there].tolist() == [2, 5, 6, 9, 10, 3, 2, 7, 1, 3]  # [CLS] ba ka ##ba . [SEP] ...
    assert data.mask == 4 and data.sentences[2] == ["kaba"] * 63  # of two tokens each
    assert tokens[found].tolist() == [6, 9]
    changed = [*write(tmp_path, "ba kaba\n", questions), "--model", str(folder)]
    assert script.prepare_language(script.parse(changed)).fingerprint != data.fingerprint


def test_words_of_roberta_begin_with_a_space(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", "a", "b", "d", "g", "k", ".", "Ġb", "Ġba"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ b\nĠb a\n")
    vocabulary = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    transformers.RobertaTokenizer(*vocabulary).save_pretrained(tmp_path)
    config = transformers.RobertaConfig(vocab_size=len(words), **SIZES)
    config.save_pretrained(tmp_path)
    data = script.prepare_language(script.parse([*write(tmp_path), "--model", str(tmp_path)]))
    assert data.tokens["ba"] == [words.index("Ġba")]
    assert data.tokens["da"] == [words.index(letter) for letter in "Ġda"]
    assert (data.begin, data.end, data.mask) == (0, 2, 4)


def test_a_pretrained_folder_from_end_to_end(folder, tmp_path, no_figures, user_error):
    argv = [*write(tmp_path), "--model", str(folder), "--epochs", "1", "--lr", "0.1", "--batch-size", "2"]
    argv += ["--out", str(tmp_path)]
    results = {result["method"]: result["epochs"] for result in script.main(argv)["results"]}
    assert results == {"plain": 0, "plain+tuned": 1, "sphere+tuned": 1}
    runs = tmp_path / "spherization" / "analogy" / "text-tiny"
    state = torch.load(runs / "plain+tuned" / "seed0" / "checkpoint.pt", weights_only=True)["model"]
    before = script.build_encoder(script.parse(argv), "plain", None).state_dict()
    key = "encoder.encoder.layer.0.output.dense.weight"
    assert before.keys() == state.keys() and not torch.equal(before[key], state[key])
    write(tmp_path, text="ba ka da .\nda ba ga\n")
    with user_error("other data", "--overwrite"):
        script.main(argv)


def test_what_a_model_cannot_read_is_one_line(folder, tmp_path, user_error):
    from safetensors.torch import load_file, save_file

    argv = [*write(tmp_path), "--out", str(tmp_path / "out"), "--method", "plain", "--model"]

    def refused(model, *words, more=()):
        with user_error(*words):
            script.main([*argv, str(model), *more])

    (tmp_path / "three.txt").write_text("ba da ka\n")
    (tmp_path / "unknown.txt").write_text("one two three four\n")
    (tmp_path / "twice.txt").write_text("ba da ba da\n")
    (tmp_path / "empty.txt").write_text("\n")
    refused(folder, "three.txt", "ba da ka", "four words", more=["--analogies", str(tmp_path / "three.txt")])
    for name in ("unknown.txt", "twice.txt"):
        refused(folder, "no question", "knows", more=["--analogies", str(tmp_path / name)])
    refused(folder, "no sentence", more=["--text", str(tmp_path / "empty.txt")])
    bare = tmp_path / "bare"
    bare.mkdir()
    refused(bare, f"--model {bare}", "cannot be loaded")
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    refused(bare, f"--model {bare}", "cannot be loaded")  # no weights
    (bare / "model.safetensors").write_bytes(b"x" * 100)
    refused(bare, f"--model {bare}", "cannot be loaded")
    weights = load_file(folder / "model.safetensors")
    some = {key: value for key, value in weights.items() if "layer.1." not in key}
    save_file(some, bare / "model.safetensors", metadata={"format": "pt"})
    refused(bare, f"--model {bare}", "has no weights for", "layer.1")
    assert not (tmp_path / "out").exists()
