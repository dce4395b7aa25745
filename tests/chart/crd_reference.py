"""docs/crd.md out of crds/qwenpipeline.yaml: every field with its type, default, bounds and meaning, and every rule between fields.
templates_test.py compares; its --update writes."""
import yaml

from helm_chart import CRD, ROOT

DOCUMENT = ROOT / "docs/crd.md"
HEAD = """# QwenPipeline, field by field

Made from [crds/qwenpipeline.yaml](../crds/qwenpipeline.yaml) by `tests/chart/templates_test.py --update`; do not edit. What the operator does
with it is in [operator.md](operator.md), what `qwenctl run` does in [operations.md](operations.md). `kubectl explain qp.spec` says the same.
"""


def kind(schema):
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema["type"] == "array":
        return "list of " + kind(schema["items"])
    if schema["type"] == "object" and "additionalProperties" in schema:
        return "map of " + kind(schema["additionalProperties"])
    if schema["type"] == "object" and "properties" not in schema:
        return "any object"
    return schema["type"]


def bounds(schema):
    parts = []
    if "enum" in schema:
        parts.append(", ".join(f"`{value}`" for value in schema["enum"]))
    low, high = (schema.get(key) for key in ("minimum", "maximum"))
    if low is not None or high is not None:
        parts.append(f"{'' if low is None else low} … {'' if high is None else high}".strip())
    if "maxLength" in schema:
        parts.append(f"{schema.get('minLength', 0)} … {schema['maxLength']} characters")
    if "maxItems" in schema:
        parts.append(f"{schema.get('minItems', 0)} … {schema['maxItems']} items")
    if "maxProperties" in schema:
        parts.append(f"at most {schema['maxProperties']} keys")
    return "; ".join(parts)


def default(schema, required):
    if required:
        return "required"
    value = schema.get("default")
    return "" if value is None or value == {} else f"`{value}`" if not isinstance(value, bool) else f"`{str(value).lower()}`"


def rows(schema, path, pod):
    """Table rows of an object's fields, nested ones after their parent. A pod's fields are told once, under `pod`."""
    properties = schema["properties"]
    own = {name: field for name, field in properties.items() if path == "POD" or pod is None or pod.get(name) is not field}
    for name, field in own.items():
        where = f"{path}.{name}" if path and path != "POD" else name
        inner = field
        while inner.get("type") == "array":
            inner, where = inner["items"], where + "[]"
        nested = inner.get("type") == "object" and "properties" in inner
        is_pod = pod is not None and nested and inner["properties"] is pod
        text = " ".join(filter(None, [field.get("description", "").rstrip("."), "([as below](#a-pods-own-fields))" if is_pod else ""]))
        yield f"| `{where}` | {kind(field)} | {default(field, name in schema.get('required', []))} | {bounds(field)} | {text} |"
        if nested and not is_pod:
            yield from rows(inner, where, pod)
    if len(own) < len(properties):
        yield f"| `{path}.…` | | | | and [the fields of a pod](#a-pods-own-fields) |"


def rules(schema, path=""):
    for rule in schema.get("x-kubernetes-validations", []):
        yield f"| `{path + rule.get('fieldPath', '') or 'the object'}` | {rule['message']} |"
    for name, field in schema.get("properties", {}).items():
        where = f"{path}.{name}".lstrip(".")
        while field.get("type") == "array":
            yield from rules({k: v for k, v in field.items() if k == "x-kubernetes-validations"}, where)
            field, where = field["items"], where + "[]"
        yield from rules(field, where)


def text():
    version = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    spec, status = schema["properties"]["spec"], schema["properties"]["status"]
    pod = spec["properties"]["head"]["properties"]
    table = "| field | type | default | values | is |\n|---|---|---|---|---|\n"
    return "\n".join([
        HEAD, "## spec", table + "\n".join(rows(spec, "", pod)), "", "## A pod's own fields",
        "Of `spec.head`, `spec.stages.template`, an item of `spec.stages.list` (over the former: maps and env by key, lists one after the other, the rest "
        "replaced) and `spec.weights.template`.\n", table + "\n".join(rows({"properties": pod}, "POD", pod)), "", "## Rules between fields",
        "Checked by the API server (CEL) and by `qwenctl`.\n", "| where | rule |\n|---|---|\n" + "\n".join(dict.fromkeys(rules(schema))), "", "## status",
        table + "\n".join(rows(status, "", None)), "", "## Columns of `kubectl get qp`", "| column | is |\n|---|---|",
        *[f"| {column['name']} | `{column['jsonPath'].replace('|', chr(92) + '|')}`{', with -o wide' if column.get('priority') else ''} |" for column in version["additionalPrinterColumns"]], ""])
