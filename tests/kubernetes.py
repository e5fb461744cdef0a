"""Manifests against Kubernetes' structural schemas, as strictly as `kubectl apply --validate=strict`."""

from collections.abc import Iterator
from typing import Any

import jsonschema


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema that refuses fields a structural schema does not name.

    A structural schema lists fields and says nothing of others, which Kubernetes drops in silence. An object for which
    it lists none (`metadata`) is free.
    """
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        out["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = strict(schema[key])
    if schema.get("nullable"):
        out = {"anyOf": [out, {"type": "null"}]}
    return out


def faults(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, each with its place."""
    validator = jsonschema.Draft7Validator(strict(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def pod_specs(manifest: Any) -> Iterator[dict[str, Any]]:
    """All pod specs anywhere in a manifest."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        for value in manifest.values():
            yield from pod_specs(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pod_specs(value)
