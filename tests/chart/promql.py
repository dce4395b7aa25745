"""The names in PromQL, for tests that hold panels and alerts against what the binaries export. promtool checks the grammar; this
only has to find metric names, matchers and grouping labels."""
import re

KEYWORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset", "inf", "nan"}
VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$pipeline": ".*", "$replica": ".*"}


def expressions(dashboard):
    """[(panel's title, PromQL with Grafana's variables filled in)]"""
    found = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", [])]
    found += [(a["name"], a["expr"]) for a in dashboard["annotations"]["list"]]
    result = []
    for title, text in found:
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        result.append((title, text))
    return result


def selectors(text):
    """[(metric, {label: (operator, value)})], and the set of labels that the expression groups or joins by."""
    groups = set()

    def grouping(match):
        groups.update(name.strip() for name in match.group(1).split(",") if name.strip())
        return " "
    text = re.sub(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", grouping, text)
    found = []

    def selector(match):
        name, inside = match.group(1), match.group(2) or ""
        if name in KEYWORDS:
            return match.group(0)
        found.append((name, {label: (op, value) for label, op, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside)}))
        return " "
    text = re.sub(r"\[[^\]]*\]", " ", text)
    re.sub(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()\s*(\{[^}]*\})?", selector, text)
    return found, groups
