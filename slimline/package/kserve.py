"""An InferenceService for KServe, and what has to lie behind its storage uri.

A graph or an engine is served by KServe's Triton runtime, with slimline's signature; an hf model by its Hugging Face
runtime, which answers with the probability of every label by number. Beside inferenceservice.yaml lies the one folder
whose contents go to the storage uri.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from slimline import artifact, hf
from slimline.errors import ConfigError, ModelError
from slimline.package import Model, plain, triton

SERVICE, REPOSITORY, FOLDER = "inferenceservice.yaml", "repository", "model"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?")
"""What KServe takes, and short enough for <name>-predictor to be a DNS label, which has 63 characters at most."""
URI = re.compile(r"(?:file:///|(?:s3|gs|hdfs|webhdfs|https?|pvc|hf|oci)://[^\s/])\S*")
"""The schemes that KServe's admission lets through; it takes anything else for a path in the image."""
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
GIB = 1 << 30


def write(model: Model, out: Path) -> None:
    """Write the service and its folder. Raises ConfigError for a name or a uri that Kubernetes would refuse."""
    check(model)
    if model.manifest.format == "hf":
        values = plain.require(model, "KServe's Hugging Face runtime")
        if "quantization_config" in values:
            raise ModelError(
                f"{model.ref} has packed weights, which transformers alone does not load. Package it for vllm."
            )
        plain.write(model, values, out / FOLDER)
    else:
        (out / REPOSITORY).mkdir()
        triton.write(model, out / REPOSITORY)
    shutil.copyfile(model.path / artifact.MANIFEST, out / artifact.MANIFEST)
    import yaml

    text = yaml.safe_dump(service(model), sort_keys=False, allow_unicode=True)
    (out / SERVICE).write_text(text, encoding="utf-8")


def started(model: Model, out: Path) -> tuple[str, str]:
    """What to do first, and the command that starts the service."""
    folder = FOLDER if model.manifest.format == "hf" else REPOSITORY
    return (
        f"Copy what is in {out / folder} to {model.storage_uri}.",
        f"kubectl apply -f {shlex.quote(str(out / SERVICE))}",
    )


def check(model: Model) -> None:
    """Raise ConfigError for what is missing, or is no uri, name or tag in Kubernetes."""
    if not model.storage_uri:
        raise ConfigError("kserve must be told where the cluster will find the model: --storage-uri s3://bucket/path.")
    if not URI.fullmatch(model.storage_uri):
        raise ConfigError(
            f"{model.storage_uri!r} is no storage uri of KServe. Give one such as s3://bucket/path or pvc://claim/path."
        )
    if not NAME.fullmatch(model.name):
        raise ConfigError(
            f"{model.name!r} cannot name a service in Kubernetes. Name it with -n: a small letter first, then at most "
            "52 small letters, digits and '-', no '-' at the end."
        )
    if model.manifest.format == "tensorrt" and not model.runtime_version:
        version = model.manifest.runtime["version"]
        raise ConfigError(
            f"an engine needs the release of Triton that has its TensorRT, {version}; KServe's own choice is older. "
            "Name the tag of that image: --runtime-version 26.09-py3, for example."
        )
    if model.runtime_version and not TAG.fullmatch(model.runtime_version):
        raise ConfigError(f"{model.runtime_version!r} is no tag of an image. Give one such as 26.09-py3.")


def service(model: Model) -> dict[str, Any]:
    """The InferenceService (serving.kserve.io/v1beta1)."""
    tag = {"runtimeVersion": model.runtime_version} if model.runtime_version else {}
    origin = {"slimline/ref": model.ref, "slimline/digest": model.manifest.digest}
    labels = {"slimline/labels": json.dumps(model.manifest.labels, ensure_ascii=False)}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": model.name, "annotations": origin | labels},
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 1000,  # Triton's image would start as root
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "model": {
                    **(hugging_face(model) if model.manifest.format == "hf" else on_triton(model)),
                    **tag,
                    "storageUri": model.storage_uri,
                    "resources": resources(model),
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                },
            }
        },
    }


def on_triton(model: Model) -> dict[str, Any]:
    """The part for Triton."""
    arguments = triton.options(model).split()
    return {
        "modelFormat": {"name": "triton", "version": "2"},
        "protocolVersion": "v2",
        **({"args": arguments} if arguments else {}),
    }


def hugging_face(model: Model) -> dict[str, Any]:
    """The part for KServe's Hugging Face runtime, in plain transformers and float32, as the model was judged."""
    return {
        "modelFormat": {"name": "huggingface", "version": "1"},
        "protocolVersion": "v1",
        "args": [
            f"--model_name={model.name}",
            "--task=sequence_classification",
            "--backend=huggingface",
            f"--max_model_len={hf.max_length(model.path)}",
            "--dtype=float32",
            "--return_probabilities",
        ],
    }


def resources(model: Model) -> dict[str, dict[str, str]]:
    """A core and memory: two GiB for the runtime, three times the weights for reading, holding and using them."""
    memory = f"{2 + -(-3 * model.manifest.weights_bytes // GIB)}Gi"
    gpu = {"nvidia.com/gpu": "1"} if model.manifest.format == "tensorrt" else {}
    return {"requests": {"cpu": "1", "memory": memory, **gpu}, "limits": {"memory": memory, **gpu}}
