"""junit.xml, for the CI systems that show it: gates, artefact checks, one case per forgetting suite."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from ftune.quantities import are_all, format_difference, format_gate

ARTEFACT_CHECKS = ("adapter_live", "keys_loaded", "reload_max_diff", "merged_max_diff")


def junit(report: Mapping[str, Any]) -> str:
    """A suite of forgetting never fails by itself; the gate max_forgetting does that."""
    suite = ElementTree.Element("testsuite", name="ftune")
    for gate in report.get("gates") or []:
        if gate["name"] not in ARTEFACT_CHECKS:
            case = _case(suite, "gates", gate["name"])
            if not gate["passed"]:
                value, limit = format_gate(gate["value"]), format_gate(gate["limit"])
                _say(case, "failure", f"{gate['name']} is {value}, its limit is {limit}")
    artefact = report.get("artefact") or {}
    for name in ARTEFACT_CHECKS:
        _artefact_case(suite, name, artefact)
    for measured in (report.get("forgetting") or {}).get("suites") or []:
        case = _case(suite, "forgetting", measured["name"])
        properties = ElementTree.SubElement(case, "properties")
        for key, value in measured.items():
            if key != "name":
                ElementTree.SubElement(properties, "property", name=key, value=str(value))
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    suite.set("time", f"{(report.get('cost') or {}).get('seconds') or 0:.3f}")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def artefact_holds(name: str, artefact: Mapping[str, Any]) -> bool | None:
    """Whether one check of the files held; None where it was not measured, or has no limit to judge it by."""
    value, limit = artefact.get(name), artefact.get("tolerance")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return are_all(value)
    return None if limit is None else bool(value <= limit)


def _artefact_case(suite: ElementTree.Element, name: str, artefact: Mapping[str, Any]) -> None:
    case, value, holds = _case(suite, "artefact", name), artefact.get(name), artefact_holds(name, artefact)
    if value is None:
        _say(case, "skipped", str(artefact.get("reason") or "not measured"))
    elif holds is False:
        messages = {
            "adapter_live": "the adapter changes nothing",
            "keys_loaded": f"only {value} tensors were loaded",
        }
        limit = format_difference(artefact.get("tolerance"))
        default = f"logits differ by {value if isinstance(value, str) else format_difference(value)}, limit {limit}"
        _say(case, "failure", messages.get(name, default))


def _case(suite: ElementTree.Element, group: str, name: object) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=f"ftune.{group}", name=str(name))


def _say(case: ElementTree.Element, tag: str, message: str) -> None:
    ElementTree.SubElement(case, tag, message=message)
