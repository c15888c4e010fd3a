"""``export_model``: what the file computes, what is constant in it, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from lightning_bsr import ConfigurationError, DigitsDataModule, ViTClassifier
from lightning_bsr.export import _export, _formats, export_model
from lightning_bsr.functional import install_token_drop, quantize_frozen_, select_blocks_
from lightning_bsr.models import convert_to_moe_
from vit_families import FAMILIES

SIZE, PATCHES, WIDTH = 32, 16, 48


@pytest.fixture(scope="module")
def pictures():
    data = DigitsDataModule(batch_size=8, augment=False, num_workers=0)
    return next(iter(data.val_dataloader()))[0]


def make_vit(**options):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, num_classes=4, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def dropping(model, blocks=(1,), **options):
    install_token_drop(model, blocks, 0.5, **options)
    return model


def shapes_of(graph):
    """The shape of each value in an ONNX graph; a dimension that is no constant is a name."""
    values = [*onnx.shape_inference.infer_shapes(onnx.load(graph)).graph.value_info, *onnx.load(graph).graph.input]
    return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}


def num_products(graph, shapes):
    """Count the multiplications of all matrix products in an ONNX graph."""
    shapes = shapes | {each.name: list(each.dims) for each in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            first, second = (shapes[name] for name in node.input[:2])
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            total += torch.Size(first).numel() * second[-2 if transposed else -1]
    return total


@pytest.mark.parametrize(
    ("options", "drop", "tokens"),
    [
        ({"reg_tokens": 2}, {}, 3 + 8 + 1),
        ({"class_token": False, "global_pool": "avg"}, {}, 8 + 1),
        ({}, {"fuse": False}, 1 + 8),
        ({}, {"restore": True}, 1 + 8 + 1),
    ],
    ids=["registers", "no class token", "unfused", "restored"],
)
def test_onnx__has_the_drop_as_constants(options, drop, tokens, pictures, tmp_path):
    model = make_vit(**options)
    export_model(model, pictures[:2], tmp_path / "whole.onnx")
    exported = export_model(dropping(model, **drop), pictures[:2], tmp_path / "model.onnx", check=[pictures[2:4]])
    assert exported.format == "onnx"
    assert exported.max_difference < 1e-5
    assert (exported.num_compared, exported.num_near_ties) == (4, 0)
    assert exported.num_bytes == (tmp_path / "model.onnx").stat().st_size

    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    sorts = [node for node in graph.node if node.op_type == "TopK"]
    assert constants[sorts[0].input[1]].tolist() == [PATCHES]  # sorts all; the first 8 are kept, the others fused
    shapes, whole = shapes_of(tmp_path / "model.onnx"), shapes_of(tmp_path / "whole.onnx")
    assert shapes["images"] == [2, 3, SIZE, SIZE]
    assert all(isinstance(size, int) for shape in shapes.values() for size in shape)
    # The MLPs of the block that drops and of the one after it.
    hidden = [shapes[node.output[0]] for node in graph.node if node.op_type == "Erf"]
    before = PATCHES + options.get("reg_tokens", 0) + options.get("class_token", True)
    assert [shape[1] for shape in hidden] == [before, tokens, tokens]
    products = num_products(graph, shapes)
    undropped = num_products(onnx.load(tmp_path / "whole.onnx").graph, whole)
    # The MLPs of two blocks and the attention of one have fewer tokens.
    assert 0.5 * undropped < products < 0.85 * undropped


def test_pt2__needs_torch_alone(pictures, tmp_path):
    model = ViTClassifier(num_classes=10)
    install_token_drop(model, [3, 6, 9], 0.5)
    exported = export_model(model, pictures[:2], tmp_path / "model.pt2")
    assert exported.max_difference == 0
    program = torch.export.load(tmp_path / "model.pt2")
    tensors = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert all(type(size) is int for tensor in tensors for size in tensor.shape)
    operators = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert operators == {"aten"}
    attended = [n.args[0].meta["val"].shape[2] for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert attended == [65] * 4 + [34] * 3 + [19] * 3 + [11] * 2
    assert not any(each.any() for each in program.example_inputs[0])  # no picture of the user's
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["vit", "dinov3", "torchvision"])
def test_onnx__of_other_libraries(name, pictures, tmp_path):
    if name != "torchvision":
        pytest.importorskip("transformers")
    model = dropping(FAMILIES[name]().model, (1, 2))
    exported = export_model(model, pictures[:2], tmp_path / "model.onnx", check=[pictures[2:4]])
    assert exported.max_difference < 1e-4
    assert exported.num_compared >= 3


def test_onnx__holds_quantised_weights_as_they_are(pictures, tmp_path):
    model = dropping(make_vit())
    select_blocks_(model, [2])
    export_model(model, pictures[:1], tmp_path / "floats.onnx")
    quantize_frozen_(model)
    exported = export_model(model, pictures[:1], tmp_path / "codes.onnx", check=[pictures[1:2]])
    assert exported.max_difference < 1e-5
    constants = onnx.load(tmp_path / "codes.onnx").graph.initializer
    codes = sum(torch.Size(each.dims).numel() for each in constants if each.data_type == onnx.TensorProto.INT8)
    # The MLPs of two blocks; the exporter's optimizer computes what has fewer than 8192 values, such as the others.
    assert codes == 2 * 8 * WIDTH**2
    assert exported.num_bytes < (tmp_path / "floats.onnx").stat().st_size - 2.5 * codes


@pytest.mark.filterwarnings("ignore")  # executorch's own, of several kinds
def test_executorch__computes_the_same(pictures, tmp_path):
    pytest.importorskip("executorch")
    exported = export_model(dropping(make_vit()), pictures[:2], tmp_path / "model.pte", check=[pictures[2:4]])
    assert exported.format == "executorch"
    assert exported.max_difference < 1e-4


def test_near_ties__are_counted_and_not_compared(pictures, tmp_path):
    model = dropping(make_vit())
    with torch.no_grad():
        model.pos_embed.zero_()
    two = torch.stack([pictures[0], torch.zeros(3, SIZE, SIZE)])  # all patches of black are alike
    exported = export_model(model, two, tmp_path / "model.pt2")
    assert (exported.num_compared, exported.num_near_ties) == (1, 1)
    assert str(exported).endswith("on 1 pictures; 1 with nearly equal scores were left out")
    with pytest.raises(ConfigurationError) as error:
        export_model(model, two[1:], tmp_path / "other.pt2")
    assert str(error.value) == (
        "In all 1 pictures a kept and a dropped token have nearly the same score, so nothing can be compared; give "
        "real pictures, which are not of one colour."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_difference__leaves_what_was_there(error, pictures, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("before")

    def load(path):
        run = _formats._load_pt2(path)
        return lambda *inputs: [each + error for each in run(*inputs)]

    pt2 = _formats.FileFormat(".pt2", (), "", _formats._write_pt2, load)
    monkeypatch.setitem(_formats.FORMATS, "pt2", pt2)
    with pytest.raises(ConfigurationError) as raised:
        export_model(make_vit(), pictures[:1], path, overwrite=True)
    assert str(raised.value) == (
        f"The exported model differs from the module by {error:.1e} on 1 pictures, expected at most 0.0001; '{path}' "
        "is not written."
    )
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]


class WithTask(nn.Module):
    def forward(self, images, task):
        return images


def test_export_model__refuses(pictures, tmp_path, monkeypatch):
    model, path = make_vit(), tmp_path / "model.onnx"
    moe = make_vit()
    convert_to_moe_(moe, [2], num_experts=4)
    there = tmp_path / "there.pt2"
    there.touch()
    formats = "'onnx' (.onnx), 'pt2' (.pt2), 'executorch' (.pte)"
    shapes = "((1, 3, 32, 32),), expected ((2, 3, 32, 32),)"
    monkeypatch.setattr(_formats, "MAX_ONNX_BYTES", 0)
    for (module, output, options), message in (
        ((model, path, {"format": "tflite"}), f"format is 'tflite', expected one of {formats}."),
        (
            (model, path, {"format": "pt2"}),
            f"The file is '{path}' with format 'pt2', expected a name that goes with one of {formats}.",
        ),
        ((model, "m.tflite", {}), f"The file is 'm.tflite', expected a name that goes with one of {formats}."),
        ((model, there, {}), f"The file is '{there}', which exists already; with overwrite=True it is replaced."),
        ((model, "no/m.pt2", {}), "The file is 'no/m.pt2', but there is no folder 'no'; make it first."),
        ((model, path, {"check": [pictures[:1]]}), f"check has inputs of the shapes {shapes} as in example_inputs."),
        (
            (WithTask(), path, {}),
            "The forward of WithTask takes (images, task), but example_inputs has 1 tensors; export a module that "
            "takes these and gives the others itself.",
        ),
        (
            (dropping(make_vit(), score="random"), path, {}),
            "The model drops tokens with score='random', a control that gives something else each time; export it with "
            "score='cls' or 'mean'.",
        ),
        (
            (moe, path, {}),
            "VisionTransformer has mixtures of experts, whose experts take as many tokens as a picture sends them; "
            "such shapes cannot be exported as constants.",
        ),
        (
            (model, path, {}),
            "format is 'onnx', but the weights take 0.00 GiB and such a file holds at most 2; use 'pt2'.",
        ),
    ):
        with pytest.raises(ConfigurationError) as error:
            export_model(module, pictures[:2], output, **options)
        assert str(error.value) == message
    assert [each.name for each in tmp_path.iterdir()] == ["there.pt2"]


def test_export_model__names_packages_that_are_missing(pictures, tmp_path, monkeypatch):
    find_spec = _formats.importlib.util.find_spec
    missing = ("onnxscript", "onnxruntime", "executorch")
    monkeypatch.setattr(_formats.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setattr(_export, "FORMATS", None)  # nothing is done
    for suffix, message in (
        (
            "onnx",
            "format is 'onnx', for which onnxscript, onnxruntime is not installed: pip install 'lightning-bsr[export]'",
        ),
        (
            "pte",
            "format is 'executorch', for which executorch is not installed: pip install 'lightning-bsr[executorch]'",
        ),
    ):
        with pytest.raises(ConfigurationError) as error:
            export_model(make_vit(), pictures[:1], tmp_path / f"model.{suffix}")
        assert str(error.value) == message


def test_device_script__needs_neither_torch_nor_lightning(pictures, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(import numpy as np\nimport onnxruntime\n.*?)```", page, re.DOTALL)
    model = dropping(make_vit())
    export_model(model, pictures[:1], tmp_path / "model.onnx")
    Image.new("RGB", (48, 40), "gray").save(tmp_path / "picture.png")
    ending = "import sys\nprint(sorted({'torch', 'lightning', 'lightning_bsr', 'timm'} & {*sys.modules}))"
    command = [sys.executable, "-c", script + ending]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert re.fullmatch(r"class [0-3]", first)
    assert last == "[]"
