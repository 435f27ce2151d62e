"""Packages for ONNX Runtime GenAI: the source's very integers, and the source's answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimline import artifact, decoder, grid, keys_values, language, layerwise, packed, probe, step
from slimline.errors import ModelError
from slimline.export import genai
from slimline.packed import Integers, Scheme
from slimline.processor import Processor
from slimline.quantize import fp8_w8a8, kv_cache, smoothquant
from slimline.sampling import Sampling
from slimline.shards import Weights
from tests.decoders import make_decoder, make_documents, seal_decoder

PROMPTS = ["the film is", "a long and very dull story with a bright end and", "plot", ""]
SHORT = Sampling.of({"max_tokens": 12})


def pack(source, out):
    """The model with layers in whole numbers, of 4 bits but for the values' 8, and zero points in some."""
    kind, schemes = decoder.FAMILIES["llama"], {}
    out.mkdir()
    for layer in layerwise.walk(source, out):
        packing = {}
        for name in kind.maps:
            scheme = Scheme(8 if name == kind.value else 4, 32, name != kind.down)
            scale, zero = grid.fit(layer.weight(name), scheme, search=False)
            numbers = grid.nearest(layer.weight(name), scale, zero, scheme.bits)
            packing[name] = packed.pack(Integers(numbers, scale, zero), scheme.bits)
            schemes[f"{layer.name}.{name}"] = scheme
        layer.store(packing)
    grid.finish(source, out, schemes)
    return seal_decoder(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("genai")


@pytest.fixture(scope="module")
def documents(place):
    return str(make_documents(place / "documents.parquet"))


@pytest.fixture(scope="module")
def floats(place):
    return seal_decoder(make_decoder("llama", place / "floats", tied=True, seed=3))


@pytest.fixture(scope="module")
def whole(place, floats):
    return pack(floats, place / "whole")


def export(source, out, **options):
    out.mkdir()
    metrics = genai.run(source, out, genai.Config(**options))
    artifact.seal(out, format="genai", task=decoder.TASK, labels=(), base="made for a test")
    return out, metrics


@pytest.fixture(scope="module")
def package(place, whole, documents):
    return export(whole, place / "package", data=documents)


@pytest.fixture(scope="module")
def float_package(place, floats, documents):
    return export(floats, place / "float-package", data=documents)


def tensors(folder):
    import onnx

    model = onnx.load(str(folder / "model.onnx"))
    return model, {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def test_every_matrix_is_in_the_package_in_the_very_numbers_of_the_source(package, whole):
    model, found = tensors(package[0])
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits" and "layers.1/" in n.name]
    weights, seen = Weights(whole), []
    for node in nodes:
        number = {a.name: a.i for a in node.attribute}
        data = found[node.input[1]].reshape(number["N"], -1)
        raised = data if number["bits"] == 8 else np.stack([data & 15, data >> 4], 2).reshape(number["N"], -1)
        zero = 2 ** (number["bits"] - 1)
        if len(node.input) > 3:
            packed_zeros = found[node.input[3]].reshape(number["N"], -1)
            zero = np.stack([packed_zeros & 15, packed_zeros >> 4], 2).reshape(number["N"], -1)
            zero = np.repeat(zero[:, : found[node.input[2]].shape[1]], number["block_size"], 1).astype(np.float32)
        scale = np.repeat(found[node.input[2]], number["block_size"], 1)
        seen.append((raised.astype(np.float32) - zero) * scale)
    names = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"]]
    parts = [["self_attn." if n[0] in "qkvo" else "mlp.", n] for group in names for n in group]
    of = {n: weights.read(f"model.layers.1.{where}{n}.weight").float().numpy() for where, n in parts}
    assert len(seen) == len(names)
    for matrix, group in zip(seen, names):
        np.testing.assert_array_equal(matrix, np.concatenate([of[n] for n in group]))


def test_it_says_how_near_it_is(package):
    metrics = package[1]
    assert metrics["packed_maps"] == 14 and metrics["head_bits"] == 8
    assert metrics["parity_max_abs"] < 1e-3
    assert 0 < metrics["kl_mean"] < 0.05


def test_a_tied_table_is_there_once(package):
    model, found = tensors(package[0])
    tables = [name for name, values in found.items() if values.dtype == np.uint8 and "layers" not in name]
    assert tables == ["lm_head.MatMul.weight_Q8"]
    lookup = next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    assert lookup.input[2] == "lm_head.MatMul.weight_scales"


def test_a_head_of_four_bits_is_a_table_of_its_own_and_loses_less_than_the_nearest(floats, package, place, documents):
    import torch

    folder, metrics = export(floats, place / "head", data=documents, head_bits=4, kl=1)
    model, _ = tensors(folder)
    node = next(n for n in model.graph.node if n.name == "/lm_head/MatMul")
    assert {a.name: a.i for a in node.attribute}["bits"] == 4 and len(node.input) == 4
    lookup = next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")
    assert {a.name: a.i for a in lookup.attribute}["bits"] == 8
    whole, plain = decoder.load(floats), decoder.load(floats)
    weight = whole.lm_head.weight.detach()
    scale, zero = grid.fit(weight, Scheme(4, 64 if weight.shape[1] % 64 == 0 else 32, symmetric=False))
    whole.lm_head.weight = torch.nn.Parameter(Integers(grid.nearest(weight, scale, zero, 4), scale, zero).floats())
    asked = genai.prompts(floats, Path(documents))
    nearest = genai.difference(genai._logits(plain, asked), genai._logits(whole, asked)).kl_mean
    assert metrics["head_bits"] == 4 and metrics["kl_mean"] < nearest


def test_the_head_answers_for_the_last_token_unless_asked_for_more(float_package):
    graph = language.Graph(float_package[0], threads=1)
    given = {"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3), dtype=np.int64)}
    for node in graph.session.get_inputs():
        empty = np.zeros((1, node.shape[1] if len(node.shape) == 4 else 0, 0, graph.head_width), np.float32)
        given.setdefault(node.name, np.arange(3)[None] if node.name == "position_ids" else empty)
    every = graph.logits([[3, 4, 5]])[0]
    for kept, expected in ((None, every[:, -1:]), (0, every), (2, every[:, -2:])):
        more = {} if kept is None else {language.KEPT: np.array([kept])}
        np.testing.assert_array_equal(graph.session.run(["logits"], given | more)[0], expected)
    assert every.shape[1] == 3


def test_a_package_from_before_the_head_was_given_one_token_answers_still(float_package, tmp_path):
    import onnx

    old = tmp_path / "old"
    shutil.copytree(float_package[0], old)
    model = onnx.load(str(old / "model.onnx"), load_external_data=False)
    head = next(n for n in model.graph.node if n.name == "/lm_head/MatMul")
    head.input[0] = next(n for n in model.graph.node if n.name == "/lm_head/MatMul/Slice").input[0]
    model.graph.input.remove(next(i for i in model.graph.input if i.name == language.KEPT))
    model.graph.initializer.remove(next(i for i in model.graph.initializer if i.name == language.KEPT))
    unused = [n for n in model.graph.node if n.name in ("/lm_head/MatMul/Slice", "/lm_head/MatMul/Neg")]
    for node in unused:
        model.graph.node.remove(node)
    onnx.save(model, str(old / "model.onnx"))
    ids = [[3, 4, 5]]
    np.testing.assert_array_equal(
        language.Graph(old, 1).logits(ids)[0], language.Graph(float_package[0], 1).logits(ids)[0]
    )


def test_floats_come_out_as_floats_and_write_what_pytorch_writes(float_package, floats):
    folder, metrics = float_package
    assert metrics["head_bits"] == 0 and metrics["packed_maps"] == 0
    assert metrics["parity_max_abs"] < 1e-4
    here, there = language.load(folder, threads=1), language.load(floats, threads=1)
    assert here.generate(PROMPTS, SHORT) == there.generate(PROMPTS, SHORT)
    assert here.generate(PROMPTS[:1], SHORT) == here.generate(PROMPTS, SHORT)[:1]
    assert here.chat([{"role": "user", "content": "plot"}], SHORT) == there.chat(
        [{"role": "user", "content": "plot"}], SHORT
    )
    drawn = Sampling.of({"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 5})
    assert here.generate(PROMPTS, drawn) == there.generate(PROMPTS, drawn)


def test_a_package_reads_step_by_step_what_it_reads_at_once(float_package):
    model = language.load(float_package[0], threads=1)
    ids = model.encode(PROMPTS[1])
    at_once = model.logits([ids])[0]
    state = model.prefill([ids[:-2]], room=4)
    np.testing.assert_allclose(state.logits_BV[0], at_once[-3], atol=1e-4)
    state = model.step(model.step(state, ids[-2]), ids[-1])
    np.testing.assert_allclose(state.logits_BV[0], at_once[-1], atol=1e-4)
    rows = [[3, 4, 5, 6], [9, 8, 7, 6]]
    together = model.step(model.prefill(rows, room=4)).logits_BV
    alone = [model.step(model.prefill([row], room=4)).logits_BV[0] for row in rows]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_package_is_blessed_and_needs_no_torch(package):
    found = probe.probe(package[0])
    assert (found["ok"], found["problem"]) == (True, "")
    code = (
        "import sys; from slimline import language; from slimline.sampling import Sampling;"
        "m = language.load(sys.argv[1], 1); m.generate(['the film'], Sampling.of({'max_tokens': 2})); m.logits([[3]]);"
        "print(sorted({'torch', 'transformers', 'mlflow', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(package[0])], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_files_name_no_place_of_this_machine_and_are_the_same_twice(package, place, whole, documents):
    folder, _ = package
    for file in folder.iterdir():
        assert str(place).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes(), file.name
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    again, _ = export(whole, place / "again", data=documents)
    assert artifact.read(again).digest == artifact.read(folder).digest


def test_the_package_knows_its_context_and_its_ends(package):
    values = json.loads((package[0] / language.GENAI).read_text())
    assert values["model"]["context_length"] == values["search"]["max_length"] == 128
    assert values["model"]["eos_token_id"] == 0
    assert "quantization_config" not in json.loads((package[0] / "config.json").read_text())


def test_a_matrix_in_another_place_is_noticed(whole, tmp_path, documents, monkeypatch):
    """The built graph with two layers' matrices exchanged: their rows are not where they belong."""
    real = genai.build

    def exchanged(floats: Path, out: Path, config: genai.Config, more: list[str]) -> None:
        import onnx

        real(floats, out, config, more)
        model = onnx.load(str(out / "model.onnx"))
        for node in model.graph.node:
            if node.op_type == "MatMul" and "layers." in node.name:
                one, other = ("0", "1") if "layers.0." in node.input[1] else ("1", "0")
                node.input[1] = node.input[1].replace(f"layers.{one}.", f"layers.{other}.")
        onnx.save(model, str(out / "model.onnx"))

    monkeypatch.setattr(genai, "build", exchanged)
    with pytest.raises(ModelError, match="not in the built graph"):
        export(whole, tmp_path / "out", data=documents)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_family_that_the_builder_does_not_know_is_refused(kind, tmp_path, documents):
    source = seal_decoder(make_decoder(kind, tmp_path / "model"))
    with pytest.raises(ModelError, match=f"is a {kind} model, which ONNX Runtime GenAI's builder does not know"):
        export(source, tmp_path / "out", data=documents)


def test_a_window_that_the_graph_would_lose_is_refused(tmp_path, documents):
    source = seal_decoder(make_decoder("mistral", tmp_path / "model", sliding_window=16))
    with pytest.raises(ModelError, match="looks back 16 tokens of 128"):
        export(source, tmp_path / "out", data=documents)


def test_a_package_for_gpus_is_of_float16_and_checked_on_a_processor_where_there_is_none(whole, tmp_path, documents):
    out, metrics = export(whole, tmp_path / "out", data=documents, device="cuda")
    assert language.device(out) == "cuda" and language.providers(out) == ["CPUExecutionProvider"]
    model, found = tensors(out)
    scales = {node.input[2] for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert {found[name].dtype for name in scales} == {np.dtype(np.float16)}
    assert metrics["parity_checked"] == 1.0 and metrics["kl_mean"] < 0.05
    with pytest.raises(ModelError, match="is for an NVIDIA GPU, which ONNX Runtime finds none of here"):
        language.load(out).generate(["Hello"])


def test_a_package_for_gpus_that_strays_is_refused_without_one(whole, tmp_path, documents):
    with pytest.raises(ModelError, match="differs from its source"):
        export(whole, tmp_path / "out", data=documents, device="cuda", tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {}), ("qwen3", {}), ("gemma", {}), ("gemma2", {"sliding_window": 16}),
        ("mistral", {}), ("phi", {"width": 128}), ("phi3", {}), ("llama", {"tied": False}),
    ],
)  # fmt: skip
def test_every_family_that_the_builder_knows_says_what_its_source_says(kind, more, tmp_path, documents):
    source = seal_decoder(make_decoder(kind, tmp_path / "model", **more))
    _, metrics = export(source, tmp_path / "out", data=documents, head_bits=8, kl=0.2)
    assert metrics["parity_checked"] == 1  # strays are refused


def test_a_package_is_written_to_a_folder_that_is_named_from_where_one_stands(floats, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step.run_on_folder("export.genai", floats, Path("here"), {"data": documents}, lambda event: None)
    assert artifact.read(tmp_path / "here").format == "genai"


@pytest.fixture(scope="module")
def cached(place, floats, documents):
    out = place / "cached"
    out.mkdir()
    kv_cache.run(floats, out, kv_cache.Config(data=documents, windows=4, length=16, form="int8"))
    return seal_decoder(out)


def test_keys_and_values_of_int8_are_kept_as_int8_and_say_what_the_source_says(place, cached, documents):
    package, metrics = export(cached, place / "cached-package", data=documents, head_bits=0)
    past = {n.type for n in language.Graph(package).session.get_inputs() if n.name.startswith("past_key_values")}
    assert past == {"tensor(int8)"}
    assert metrics["parity_max_abs"] < 1e-4
    assert language.load(package).generate(PROMPTS, SHORT) == language.load(cached).generate(PROMPTS, SHORT)


def test_keys_and_values_of_int8_behind_wrong_scales_are_found(place, cached, documents, tmp_path, monkeypatch):
    right = keys_values.scales
    monkeypatch.setattr(keys_values, "scales", lambda *given: [[x / 4 for x in part] for part in right(*given)])
    with pytest.raises(ModelError, match="nats from its source, not at most 0.005"):
        export(cached, tmp_path / "out", data=documents, head_bits=0)


def test_keys_and_values_of_fp8_are_refused_with_what_to_do_instead(place, floats, documents, tmp_path):
    (tmp_path / "fp8").mkdir()
    kv_cache.run(floats, tmp_path / "fp8", kv_cache.Config(data=documents, windows=4, length=16))
    with pytest.raises(ModelError, match=r"on cpu knows nothing\. On cpu .* form=int8"):
        export(tmp_path / "fp8", tmp_path / "out", data=documents)


def smooth(floats, out, documents, **options):
    out.mkdir()
    smoothquant.run(floats, out, smoothquant.Config(data=documents, windows=4, length=16, **options))
    return seal_decoder(out)


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_inputs_of_int8_are_multiplied_as_int8_and_say_what_the_source_says(scales, floats, documents, tmp_path):
    source = smooth(floats, tmp_path / "source", documents, activations=scales)
    folder, metrics = export(source, tmp_path / "package", data=documents, head_bits=0)
    model, found = tensors(folder)
    products = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 10 and not [n for n in model.graph.node if n.op_type in ("MatMul", "MatMulNBits")][1:]
    assert all(found[n.input[1]].dtype == np.int8 for n in products)
    rounders = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(rounders) == 8  # of a layer: once for queries, keys and values, and once for gate and up
    if scales == "static":
        assert metrics["parity_max_abs"] < 1e-5  # a token's largest input lies between two numbers, a fixed scale's not
    ids = [[3, 4, 5, 6, 7, 8, 9]]
    here, there = language.load(folder, 1).logits(ids)[0], language.load(source, 1).logits(ids)[0]
    assert genai.difference([there], [here]).kl_mean < 1e-3


def test_a_token_of_zeros_has_a_scale(floats, documents, tmp_path):
    """An embedding of zeros: the norm leaves them, and nothing divides by them."""
    import torch
    from safetensors.torch import load_file, save_file

    source = smooth(floats, tmp_path / "source", documents)
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        if (name := "model.embed_tokens.weight") in weights:
            weights[name] = torch.cat((torch.zeros(1, weights[name].shape[1]), weights[name][1:]))
            save_file(weights, file, {"format": "pt"})
    (source / artifact.MANIFEST).unlink()
    folder, _ = export(seal_decoder(source), tmp_path / "package", data=documents, head_bits=0)
    assert np.isfinite(language.load(folder, 1).logits([[0, 0, 5]])).all()


def test_inputs_that_two_maps_round_differently_are_refused(floats, documents, tmp_path):
    from safetensors.torch import load_file, save_file

    source = smooth(floats, tmp_path / "source", documents, activations="static")
    file = next(f for f in source.glob("*.safetensors") if "model.layers.1.mlp.up_proj.input_scale" in load_file(f))
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.input_scale"] *= 2
    save_file(weights, file, {"format": "pt"})
    (source / artifact.MANIFEST).unlink()
    with pytest.raises(ModelError, match="inputs that are rounded in several ways"):
        export(seal_decoder(source), tmp_path / "out", data=documents)


def test_inputs_that_onnx_runtime_has_no_product_for_are_refused(floats, documents, tmp_path):
    (tmp_path / "fp8").mkdir()
    fp8_w8a8.run(floats, tmp_path / "fp8", fp8_w8a8.Config())
    with pytest.raises(ModelError, match="to float of 8 bits, which ONNX Runtime on cpu has no product for"):
        export(seal_decoder(tmp_path / "fp8"), tmp_path / "out", data=documents)
    source = smooth(floats, tmp_path / "int8", documents)
    with pytest.raises(ModelError, match="to int of 8 bits, which ONNX Runtime on cuda has no product for"):
        export(source, tmp_path / "cuda", data=documents, device="cuda")


@pytest.mark.parametrize("length", [13, 15, 16])
def test_a_prompt_in_chunks_says_what_it_says_at_once(float_package, length, monkeypatch):
    model = language.load(float_package[0])
    ids_BT = np.random.default_rng(length).integers(3, 29, size=(1, length))
    monkeypatch.setattr(language, "CHUNK", 5)
    read = model.prefill(ids_BT, room=1)
    np.testing.assert_allclose(read.logits_BV, model.logits(ids_BT)[:, -1], atol=1e-4)
    token = read.logits_BV.argmax(axis=1)
    after = model.logits(np.concatenate([ids_BT, token[:, None]], axis=1))[:, -1]
    np.testing.assert_allclose(model.step(read, int(token[0])).logits_BV, after, atol=1e-4)


def test_several_prompts_are_read_whole(float_package, monkeypatch):
    model = language.load(float_package[0])
    ids_BT = np.random.default_rng(1).integers(3, 29, size=(2, 12))
    monkeypatch.setattr(language, "CHUNK", 5)
    np.testing.assert_allclose(model.prefill(ids_BT, room=1).logits_BV, model.logits(ids_BT)[:, -1], atol=1e-4)


def test_only_processors_whose_products_overflow_take_the_slower_ones():
    old, new = (Processor("", frozenset(flags.split())) for flags in ("fpu avx2", "fpu avx2 avx512f avx512_vnni"))
    assert language.exact_products("x86_64", new) == language.exact_products("aarch64", old) == {}
    assert language.exact_products("x86_64", old) == {"session.x64quantprecision": "1"}
