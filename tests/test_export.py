"""Export: the graph says what its source says, for every family, shape, batch and length, or it is not exported."""

import json
from pathlib import Path

import numpy as np
import pytest

from slimline import artifact, graph, hf, parity
from slimline.errors import ModelError
from slimline.export import onnx as export

WIDTH, HEADS, NEURONS, LAYERS = 32, 4, 48, 3
WORDS = [f"word{number}" for number in range(60)]
FAMILIES = ["bert", "roberta", "distilbert", "electra"]


def make_model(folder: Path, family: str = "bert", heads: tuple[int, ...] = (HEADS,) * LAYERS) -> Path:
    """A random classifier with loud weights, so that every mistake shows; `heads` per layer, as pruning leaves them."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    shape |= {"intermediate_size": NEURONS, "max_position_embeddings": 48, "vocab_size": 64, "pad_token_id": 0}
    if family == "distilbert":
        shape = {"dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": NEURONS}
        shape |= {"max_position_embeddings": 48, "vocab_size": 64, "pad_token_id": 0}
    if family == "electra":
        shape["embedding_size"] = WIDTH
    if family == "roberta":
        shape["type_vocab_size"] = 1
    config = AutoConfig.for_model(family, **shape, initializer_range=0.4, id2label={0: "bad", 1: "good"})
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for layer, number in enumerate(heads):
        kept = number * WIDTH // HEADS
        for name in [n for n in weights if f"layer.{layer}.attention" in n]:
            if any(f".{kind}." in name for kind in ("query", "key", "value")):
                weights[name] = weights[name][:kept].clone()
            elif name.endswith("output.dense.weight"):
                weights[name] = weights[name][:, :kept].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    labels = ("bad", "good")
    artifact.seal(folder, format="hf", task="text-classification", labels=labels, base="")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty texts of 1 to 30 words."""
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "data.tsv"
    rows = ["text\tlabel\tsplit"]
    for index in range(40):
        text = " ".join(random.choice(WORDS, size=random.integers(1, 31)))
        rows.append(f"{text}\t{('bad', 'good')[index % 2]}\tcalibration")
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_after_export(family, data, tmp_path):
    source = make_model(tmp_path / "source", family)
    before = artifact.digest(source)
    metrics = export.run(source, tmp_path / "out", export.Config(data=str(data)))
    assert metrics["parity_max_abs"] < 1e-4
    assert metrics["parity_agreement"] == 1
    assert artifact.digest(source) == before
    assert metrics["attention_fused"] == LAYERS
    assert metrics["gelu_fused"] >= LAYERS
    assert metrics["layer_norm_fused"] >= 2 * LAYERS


@pytest.mark.parametrize("heads", [(4, 4, 4), (2, 2, 2), (1, 3, 2)])
def test_pruned_layers_keep_their_own_number_of_heads(heads, data, tmp_path):
    source = make_model(tmp_path / "source", heads=heads)
    metrics = export.run(source, tmp_path / "out", export.Config(data=str(data)))
    nodes = [n for n in graph.read(tmp_path / "out" / graph.FILE).graph.node if n.op_type == "Attention"]
    found = [next(a.i for a in node.attribute if a.name == "num_heads") for node in nodes]
    assert (tuple(found), metrics["attention_fused"]) == (heads, LAYERS)


@pytest.mark.parametrize("options", [{"fuse": False}, {"first_token": False}, {"opset": 18}])
def test_every_option_keeps_parity(options, bert, data, tmp_path):
    metrics = export.run(bert, tmp_path, export.Config(data=str(data), **options))
    assert metrics["parity_max_abs"] < 1e-4
    assert (metrics["attention_fused"] == 0) == (options.get("fuse") is False)
    assert (metrics["one_token_nodes"] > 0) == ("first_token" not in options)


def test_batches_and_lengths_that_were_never_traced_work_with_padding_on_either_side(bert, data, tmp_path):
    import onnxruntime
    import torch

    export.run(bert, tmp_path, export.Config(data=str(data)))
    session = onnxruntime.InferenceSession(tmp_path / graph.FILE, providers=["CPUExecutionProvider"])
    model = hf.load(bert).cpu()
    random = np.random.default_rng(1)
    for batch, length in [(1, 3), (1, 48), (5, 11), (17, 2)]:
        ids = random.integers(4, 60, size=(batch, length))
        for side in (slice(0, 1), slice(length - 1, length)):
            mask = np.ones_like(ids)
            mask[0, side] = 0
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": random.integers(0, 2, ids.shape)}
            with torch.inference_mode():
                expected = model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits
            assert np.allclose(session.run(["logits"], feed)[0], expected.numpy(), atol=1e-4)


def test_swapped_inputs_are_caught(bert, data, tmp_path, monkeypatch):
    honest = export.trace

    def swapping(model, file, opset):
        honest(model, file, opset)
        traced = graph.read(file)
        other = {"token_type_ids": "attention_mask", "attention_mask": "token_type_ids"}
        for node in traced.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = other.get(name, name)
        graph.write(traced, file)

    monkeypatch.setattr(export, "trace", swapping)
    for fuse in (True, False):
        with pytest.raises(ModelError, match=r"differs from its source by .* worst on 'word"):
            export.run(bert, tmp_path, export.Config(data=str(data), fuse=fuse))


def test_logits_of_texts_cut_short_are_not_taken_for_equal(bert, data):
    tokenizer = hf.tokenizer(bert, 48)
    texts = parity.texts(data, 40)
    source = hf.logits(hf.load(bert), tokenizer, texts)
    cut = hf.logits(hf.load(bert), hf.tokenizer(bert, 7), texts)
    with pytest.raises(ModelError, match="differs from its source"):
        parity.require_equal(parity.compare(source, cut), texts, 1e-3)


def test_batches_of_the_guard_are_padded_unevenly_and_hold_one_text_of_full_length(bert, data):
    texts = parity.texts(data, 40)
    tokenizer = hf.tokenizer(bert, 48)
    assert len(texts) == 41
    for start in range(0, 40, parity.BATCH):
        lengths = tokenizer.encode(texts[start : start + parity.BATCH])["attention_mask"].sum(axis=1)
        assert lengths.max() > lengths.min()
    assert tokenizer.encode(texts[-1:])["input_ids"].shape == (1, 48)


def test_the_exported_folder_is_the_same_twice_and_complete(bert, data, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    assert export.run(bert, first, export.Config(data=str(data))) == export.run(
        bert, second, export.Config(data=str(data))
    )
    assert artifact.digest(first) == artifact.digest(second)
    names = {file.name for file in first.iterdir()}
    assert names == {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    settings = json.loads((first / "config.json").read_text())
    assert (settings["id2label"], settings["slimline_max_length"]) == ({"0": "bad", "1": "good"}, 48)
    inside = graph.read(first / graph.FILE).graph
    assert [value.name for value in inside.output] == ["logits"]
    assert {value.name: value.type.tensor_type.elem_type for value in inside.input} == {
        "input_ids": 7,
        "attention_mask": 7,
        "token_type_ids": 7,
    }


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin"])
def test_weights_outside_the_folder_are_refused(location, bert, data, tmp_path):
    import onnx

    folder = tmp_path / "model"
    export.run(bert, folder, export.Config(data=str(data)))
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(folder / graph.FILE)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / graph.FILE).write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="no plain file of its folder"):
        graph.read(folder / graph.FILE)


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / graph.FILE).write_bytes(b"\xff" * 50)
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        graph.read(tmp_path / graph.FILE)


def test_a_model_without_labels_is_refused(tmp_path, data):
    source = make_model(tmp_path / "source")
    artifact.seal(source, format="hf", task="", labels=(), base="")
    with pytest.raises(ModelError, match="no classification head"):
        export.run(source, tmp_path / "out", export.Config(data=str(data)))


def test_a_difference_is_measured_in_logits_labels_and_nats():
    source = np.array([[0.0, 0.0], [2.0, 0.0]], np.float32)
    candidate = np.array([[np.log(3.0), 0.0], [2.0, 0.0]], np.float32)
    difference = parity.compare(source, candidate)
    assert difference.max_abs == pytest.approx(np.log(3))
    assert (difference.scale, difference.agreement, difference.worst) == (2, 1, 0)
    # half and half against 3/4 and 1/4: 0.5 ln(2/3) + 0.5 ln 2, over two texts
    assert difference.kl_mean == pytest.approx((0.5 * np.log(2 / 3) + 0.5 * np.log(2)) / 2)


def test_logits_that_are_not_finite_are_refused():
    zero, nan = np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)
    with pytest.raises(ModelError, match="some are not finite"):
        parity.compare(zero, nan)
    with pytest.raises(ModelError, match="the source's own answers are not all finite"):
        parity.compare(nan, zero)


def test_weights_beside_a_graph_that_end_early_are_refused(bert, data, tmp_path):
    import onnx

    export.run(bert, tmp_path, export.Config(data=str(data)))
    onnx.save(onnx.load(tmp_path / graph.FILE), tmp_path / graph.FILE, save_as_external_data=True, location="weights")
    (tmp_path / "weights").write_bytes((tmp_path / "weights").read_bytes()[:100])
    with pytest.raises(
        ModelError, match=r"model\.onnx lacks weights that it keeps beside it: .*\. Copy the whole folder"
    ):
        graph.read(tmp_path / graph.FILE)


def test_a_graph_that_is_not_valid_is_not_written(bert, data, tmp_path):
    export.run(bert, tmp_path, export.Config(data=str(data)))
    model = graph.read(tmp_path / graph.FILE)
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ModelError, match="is not valid ONNX: .*'nowhere'.* Export it again"):
        graph.write(model, tmp_path / "broken.onnx")
    assert not (tmp_path / "broken.onnx").exists()
