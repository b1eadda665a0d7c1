"""What becomes of an instance: the rules of the configuration, applied to its header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from serve.gateway.config import GatewayConfig, Rule
from ssacl.data.refusals import RefusedImageError
from ssacl.data.subject import check_subject, text_value
from ssacl.inference.dicom_results import MANUFACTURER, MODEL_NAME

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Decision:
    action: Literal["report", "pass", "refuse"]
    reason: str
    """One word of the project's or the text of a rule; never a header value."""
    destinations: tuple[str, ...] = ()


OWN_RESULT = "own_result"


@dataclass(frozen=True)
class Caller:
    """Who hands an instance in."""

    name: str
    """AE title of a C-STORE, name of a STOW-RS client ("key:pacs")."""
    way: Literal["c-store", "stow-rs"]
    address: str = ""


TurnedAway = Callable[[str, Caller], None]
"""Told "association" or "tls", and who was not let in."""


def decide(config: GatewayConfig, caller: Caller, ds: Dataset) -> Decision:
    """The first rule that the instance meets, or what is done otherwise."""
    # An archive that forwards whole studies sends our results back to us: nothing is ever made of them.
    if text_value(ds, "Manufacturer") == MANUFACTURER.upper() and text_value(ds, "ManufacturerModelName") == MODEL_NAME.upper():
        return Decision("pass", OWN_RESULT)
    subject, view = _subject(ds)
    modality = text_value(ds, "Modality")
    for rule in config.rules:
        if _meets(rule, caller, modality, view, subject):
            names = rule.destinations if rule.destinations is not None else tuple(config.destinations)
            return Decision(rule.action, rule.reason or subject, names)
    return Decision(config.otherwise, subject if subject != "frontal" else "no_rule")


def _meets(rule: Rule, caller: Caller, modality: str, view: str, subject: str) -> bool:
    calling_ae, client = (caller.name, None) if caller.way == "c-store" else (None, caller.name)
    conditions = (
        (rule.calling_ae, calling_ae),
        (rule.client, client),
        (rule.modality, modality),
        (rule.view, view),
        (rule.subject, subject),
    )
    return all(wanted is None or value in wanted for wanted, value in conditions)


def _subject(ds: Dataset) -> tuple[str, str]:
    """What is on the film, and its view as far as it is a known one."""
    try:
        # Laterals are read to know their view, then named.
        view = check_subject(ds, keep_lateral=True)
        check_subject(ds, keep_lateral=False)
    except RefusedImageError as error:
        return error.reason, "" if error.reason != "lateral" else view
    except (ValueError, TypeError, AttributeError):
        return "unreadable", ""
    return "frontal", view
