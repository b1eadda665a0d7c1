"""The draft as a DICOM Structured Report (TID 1500): unverified, partial, preliminary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ssacl.data.dicom import Picture
from ssacl.inference.dicom_results_codes import SCHEME, CodeTriple, finding_code, own_code, place_code
from ssacl.inference.film import printable
from ssacl.inference.report import DraftReport, Finding, Sentence

if TYPE_CHECKING:
    from highdicom.sr import AlgorithmIdentification, CodedConcept, ComprehensiveSR, FindingSite, QualitativeEvaluation

    from ssacl.inference.dicom_results import Source

_CHEST_FILM: CodeTriple = ("399208008", "SCT", "Plain chest X-ray")
_CERTAINTY: CodeTriple = ("111012", "DCM", "Certainty of Finding")
_PERCENT: CodeTriple = ("%", "UCUM", "%")
_FINDING: CodeTriple = ("121071", "DCM", "Finding")
_COMMENT: CodeTriple = ("121106", "DCM", "Comment")
_EVALUATIONS: CodeTriple = ("C0034375", "UMLS", "Qualitative Evaluations")


def structured_report(source: Source, _: Picture, report: DraftReport, common: dict[str, Any]) -> ComprehensiveSR:
    """The report: a group per sentence, with its box where it has one, a group per finding with its probability, and the whole text."""
    from highdicom import sr
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    algorithm = sr.AlgorithmIdentification("ssacl", report.model_version, manufacturer=common["manufacturer"])
    groups: list[Any] = [
        _sentence_group(number, sentence, source, report, algorithm) for number, sentence in enumerate(report.sentences, 1)
    ]
    groups += [_finding_group(finding, source, report, algorithm) for finding in report.findings]
    if not groups:
        groups.append(_with_text(sr.MeasurementsAndQualitativeEvaluations(_tracking("empty", source, report)), "The draft is empty."))
    device = sr.DeviceObserverIdentifyingAttributes(
        _derived("device", report.model_version),
        name="ssacl",
        manufacturer_name=common["manufacturer"],
        model_name=common["manufacturer_model_name"],
        serial_number=common["device_serial_number"],
    )
    observer = sr.ObserverContext(observer_type=_concept(("121007", "DCM", "Device")), observer_identifying_attributes=device)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_concept(_CHEST_FILM),
        imaging_measurements=groups,
        title=_concept(("126000", "DCM", "Imaging Measurement Report")),
    )
    content[0].ContentSequence.append(_evaluations(report))
    return sr.ComprehensiveSR(
        evidence=[source.stand_in],
        content=content,
        is_complete=False,
        is_final=False,
        is_verified=False,
        coding_schemes=[CodingSchemeIdentificationItem(SCHEME, name="Findings and anatomy of ssacl")],
        **common,
    )


def _evaluations(report: DraftReport) -> Any:
    """What the draft is, and its whole text (TID 1500, rows 12 and 14)."""
    from highdicom import sr

    container = sr.ContainerContentItem(_concept(_EVALUATIONS), relationship_type="CONTAINS")
    texts = [(_COMMENT, report.disclaimer), (_FINDING, printable(report.text) or "The draft is empty.")]
    container.ContentSequence = sr.ContentSequence([sr.TextContentItem(_concept(name), text, "CONTAINS") for name, text in texts])
    return container


def _sentence_group(number: int, sentence: Sentence, source: Source, report: DraftReport, algorithm: AlgorithmIdentification) -> Any:
    from highdicom import sr

    common: dict[str, Any] = {
        "tracking_identifier": _tracking(f"Sentence {number}", source, report),
        "algorithm_id": algorithm,
        "finding_type": _concept(finding_code(sentence.finding)) if sentence.finding else None,
        "finding_sites": [_site(node) for node in sentence.anatomy] or None,
        "qualitative_evaluations": [
            _evaluation("Status", sentence.status),
            _evaluation("Review", "preliminary, unverified draft"),
        ],
        "measurements": [_certainty(own_code("Token certainty"), sentence.confidence)],
    }
    if sentence.box is None:
        return _with_text(sr.MeasurementsAndQualitativeEvaluations(**common), sentence.text)
    box = source.frame.box(sentence.box, report.image_width_px, report.image_height_px)
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1), (box.x0, box.y0)]
    region = sr.ImageRegion("POLYLINE", np.array(corners), sr.SourceImageForRegion.from_source_image(source.stand_in))
    return _with_text(sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=region, **common), sentence.text)


def _finding_group(finding: Finding, source: Source, report: DraftReport, algorithm: AlgorithmIdentification) -> Any:
    from highdicom import sr

    return sr.MeasurementsAndQualitativeEvaluations(
        _tracking(finding.name, source, report),
        finding_type=_concept(finding_code(finding.name)),
        algorithm_id=algorithm,
        qualitative_evaluations=[_evaluation("Threshold", "at or above threshold" if finding.present else "below threshold")],
        measurements=[
            _certainty(_CERTAINTY, finding.probability),
            _certainty(own_code("Threshold"), finding.threshold),
        ],
    )


def _with_text(group: Any, text: str) -> Any:
    """A measurement group with its sentence (TID 1501 is extensible)."""
    from highdicom import sr

    group[0].ContentSequence.append(sr.TextContentItem(_concept(_FINDING), printable(text) or "(empty)", "CONTAINS"))
    return group


def _tracking(name: str, source: Source, report: DraftReport) -> Any:
    from highdicom import sr

    return sr.TrackingIdentifier(_derived("tracking", str(source.header.SOPInstanceUID), report.model_version, name), name)


def _derived(*parts: str) -> str:
    from ssacl.inference.dicom_results import derived_uid

    return derived_uid(*parts)


def _certainty(name: CodeTriple, share: float) -> Any:
    from highdicom import sr

    # Not a number has no decimal string; a model that gives one has nothing to say.
    percent = round(100 * float(np.clip(np.nan_to_num(share), 0, 1)), 2)
    return sr.Measurement(_concept(name), percent, _concept(_PERCENT))


def _evaluation(name: str, value: str) -> QualitativeEvaluation:
    from highdicom import sr

    return sr.QualitativeEvaluation(_concept(own_code(name)), _concept(own_code(value)))


def _site(node: str) -> FindingSite:
    from highdicom import sr

    place, side = place_code(node)
    return sr.FindingSite(_concept(place), _concept(side) if side else None)


def _concept(code: CodeTriple) -> CodedConcept:
    from highdicom.sr import CodedConcept

    return CodedConcept(*code)
