"""The page /docs: the routes and their fields, as plain HTML that loads nothing."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.2em .8em;vertical-align:top;"
    "border-bottom:1px solid #ddd}code{font-size:13px}"
)


def page(schema: dict[str, Any]) -> str:
    """An OpenAPI schema as HTML."""
    info = schema["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
        f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        "<p>Requests bring <code>Authorization: Bearer TOKEN</code> where the server has one; "
        'the schema for programs is <a href="openapi.json">openapi.json</a>.'
    ]
    for path, verbs in schema["paths"].items():
        for verb, route in verbs.items():
            parts.append(f"<h2><code>{verb.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(route.get('description', ''))}")
            body = route.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                parts.append(_fields(body["schema"], schema))
            told = "; ".join(
                f"{status}: {escape(answer['description'])}"
                for status, answer in route["responses"].items()
            )
            parts.append(f"<p><small>{told}</small>")
    return "\n".join(parts) + "\n"


def _fields(body: dict[str, Any], schema: dict[str, Any]) -> str:
    body = _resolved(body, schema)
    rows = ["<table><tr><th>field<th>type<th>"]
    for name, field in body.get("properties", {}).items():
        needed = " (required)" if name in body.get("required", []) else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code>{needed}<td>{escape(_type(field, schema))}"
            f"<td>{escape(field.get('description', ''))}"
        )
    return "".join(rows) + "</table>"


def _resolved(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for."""
    if "anyOf" in field and any("$ref" in one for one in field["anyOf"]):
        field = next(one for one in field["anyOf"] if "$ref" in one)
    if "$ref" in field:
        found: dict[str, Any] = schema["components"]["schemas"][field["$ref"].rsplit("/", 1)[1]]
        return found
    return field


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A type with its bounds and default, in a few words."""
    if "anyOf" in field:
        text = " or ".join(_type(one, schema) for one in field["anyOf"])
    elif "$ref" in field:
        found = _resolved(field, schema)
        text = "{" + ", ".join(found.get("properties", {})) + "}"
    elif "enum" in field or "const" in field:
        text = " or ".join(map(repr, field.get("enum", [field.get("const")])))
    else:
        text = str(field.get("type", "any"))
        if "items" in field:
            text += f" of {_type(field['items'], schema)}"
        bounds = [
            f"{word} {field[key]}"
            for key, word in (
                ("minimum", "from"),
                ("maximum", "to"),
                ("exclusiveMaximum", "below"),
                ("maxLength", "characters up to"),
                ("maxItems", "at most"),
            )
            if key in field
        ]
        if bounds:
            text += f" ({', '.join(bounds)})"
    if "default" in field:
        text += f", default {field['default']!r}"
    return text
