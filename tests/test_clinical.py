"""Findings scores: equal to scikit-learn and to counts by hand; policies on uncertain findings; baselines that know nothing."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from ssacl.anatomy import FINDING_INDEX, FINDINGS, FindingStatus
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.baselines import baseline_reports, prior_findings, prior_scores
from ssacl.evaluation.roc import finding_areas, mean_area, roc_auc
from ssacl.scores.clinical import CHEXPERT_FIVE, GROUPS, clinical_f1, head_f1, positives, report_f1, report_status

ABSENT, PRESENT, UNCERTAIN, UNMENTIONED = (int(each) for each in FindingStatus)
EFFUSION, HEART = FINDING_INDEX["Pleural Effusion"], FINDING_INDEX["Cardiomegaly"]


def status(*rows: dict[str, int]) -> NDArray[np.int64]:
    """[n, 14], unmentioned but for what the rows say."""
    return np.array([[row.get(name, UNMENTIONED) for name in FINDINGS] for row in rows])


def predicted(*rows: set[str]) -> NDArray[np.bool_]:
    return np.array([[name in row for name in FINDINGS] for row in rows])


@pytest.fixture
def random_case() -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    return rng.random((60, 14)) < 0.3, rng.choice([ABSENT, PRESENT, UNCERTAIN, UNMENTIONED], size=(60, 14), p=[0.2, 0.3, 0.1, 0.4])


@pytest.mark.parametrize("policy", ["present", "absent"])
@pytest.mark.parametrize("group", list(GROUPS))
def test_equal_to_scikit_learn(random_case: tuple[NDArray[np.bool_], NDArray[np.int64]], policy: str, group: str) -> None:
    stated, real = random_case
    scores = clinical_f1(stated, real, policy)  # type: ignore[arg-type]
    columns = [FINDING_INDEX[name] for name in GROUPS[group]]
    truth = positives(real, policy)[0][:, columns]  # type: ignore[arg-type]
    for average, ours in (("micro", scores.micro), ("macro", scores.macro), ("samples", scores.example)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = precision_recall_fscore_support(truth, stated[:, columns], average=average, zero_division=0)
        assert (ours[group].precision, ours[group].recall, ours[group].f1) == pytest.approx(expected[:3], abs=1e-9)


def test_by_hand() -> None:
    real = status({"Pleural Effusion": PRESENT, "Cardiomegaly": PRESENT}, {"Pleural Effusion": ABSENT}, {"Pleural Effusion": PRESENT})
    scores = clinical_f1(predicted({"Pleural Effusion"}, {"Pleural Effusion"}, {"Edema"}), real, "present")
    effusion = scores.findings["Pleural Effusion"]
    assert (effusion.precision, effusion.recall, effusion.f1, effusion.support) == (0.5, 0.5, 0.5, 2)
    assert scores.findings["Cardiomegaly"].recall == 0.0
    assert scores.micro["14"].precision == pytest.approx(1 / 3)
    assert scores.micro["14"].recall == pytest.approx(1 / 3)
    assert scores.macro["14"].f1 == pytest.approx(0.5 / 14)
    assert scores.macro["5"].f1 == pytest.approx(0.5 / 5)
    assert scores.example["14"].f1 == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_policy_on_uncertain_findings_changes_the_score_and_is_stored() -> None:
    real = status({"Cardiomegaly": UNCERTAIN}, {"Cardiomegaly": PRESENT})
    stated = predicted({"Cardiomegaly"}, set())
    by_policy = {policy: clinical_f1(stated, real, policy) for policy in ("present", "absent", "ignore")}  # type: ignore[arg-type]
    heart = {policy: scores.findings["Cardiomegaly"] for policy, scores in by_policy.items()}
    assert (heart["present"].precision, heart["present"].recall) == (1.0, 0.5)
    assert (heart["absent"].precision, heart["absent"].recall) == (0.0, 0.0)
    assert (heart["ignore"].precision, heart["ignore"].recall, heart["ignore"].support) == (0.0, 0.0, 1)
    assert by_policy["ignore"].to_json()["uncertain"] == "ignore"
    with pytest.raises(ConfigError, match="'maybe'"):
        positives(real, "maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("decimals", [1, 6])
def test_areas_equal_scikit_learn(random_case: tuple[NDArray[np.bool_], NDArray[np.int64]], decimals: int) -> None:
    probabilities = np.random.default_rng(1).random((60, 14)).round(decimals)
    for policy in ("present", "ignore"):
        truth, counted = positives(random_case[1], policy)  # type: ignore[arg-type]
        areas = finding_areas(probabilities, random_case[1], policy)  # type: ignore[arg-type]
        for column, name in enumerate(FINDINGS):
            kept = counted[:, column]
            assert areas[name] == pytest.approx(roc_auc_score(truth[kept, column], probabilities[kept, column]), abs=1e-6)
    assert mean_area(areas, "5") == pytest.approx(np.mean([areas[name] for name in CHEXPERT_FIVE]))
    assert roc_auc([0.1, 0.9], [True, True]) is None
    with pytest.raises(DataError, match="finite"):
        roc_auc([np.nan, 0.9], [True, False])


def test_json_is_plain_and_flat() -> None:
    tree = json.loads(json.dumps(clinical_f1(predicted({"Edema"}), status({"Edema": PRESENT}), "absent").to_json()))
    assert tree["f1_micro_14"] == tree["f1_micro_5"] == 1.0
    assert tree["recall_macro_5"] == 0.2
    assert list(tree["findings"]) == list(FINDINGS)
    assert tree["findings"]["Edema"]["support"] == 1


def test_groups_are_the_chexpert_ones() -> None:
    assert set(CHEXPERT_FIVE) <= set(FINDINGS)
    assert {group: len(names) for group, names in GROUPS.items()} == {"14": 14, "13": 13, "5": 5}


def test_head_uses_each_findings_own_threshold() -> None:
    probabilities = np.full((1, 14), 0.4)
    real = status({"Cardiomegaly": PRESENT, "Pleural Effusion": PRESENT})
    scores = head_f1(probabilities, {"Cardiomegaly": 0.4, "Pleural Effusion": 0.41}, real, "present")
    assert scores.findings["Cardiomegaly"].recall == 1.0
    assert scores.findings["Pleural Effusion"].recall == 0.0
    assert scores.micro["14"].precision == 1.0, "without a threshold, 0.5"
    with pytest.raises(DataError, match=r"0\.\.1"):
        head_f1(np.full((1, 14), np.nan), {}, real, "present")


def test_reports_are_read_by_the_labeler() -> None:
    reports = ["There is a left pleural effusion. The heart is normal in size.", "Possible cardiomegaly. No pleural effusion."]
    found = report_status(reports)
    assert found[0, EFFUSION] == PRESENT
    assert found[0, HEART] == ABSENT
    assert found[1, HEART] == UNCERTAIN
    same = report_f1(reports, reports, "present")
    assert same.micro["14"].f1 == 1.0
    swapped = report_f1(reports[::-1], reports, "present")
    assert swapped.findings["Pleural Effusion"].f1 == 0.0
    # What the prediction doubts is left out under "ignore": nothing of the heart is scored.
    against = status({"Pleural Effusion": PRESENT}, {"Cardiomegaly": PRESENT})
    assert report_f1(reports, against, "ignore").findings["Cardiomegaly"].support == 0
    assert report_f1(reports, against, "absent").findings["Cardiomegaly"].recall == 0.0
    assert report_f1(reports, against, "present").findings["Cardiomegaly"].recall == 1.0


@pytest.mark.parametrize(
    ("stated", "real", "message"),
    [
        (np.zeros((2, 14), dtype=bool), np.zeros((3, 14), dtype=int), "expected bool"),
        (np.zeros((2, 14)), np.zeros((2, 14), dtype=int), "float64"),
        (np.zeros((2, 13), dtype=bool), np.zeros((2, 13), dtype=int), "14 findings"),
        (np.zeros((2, 14), dtype=bool), np.full((2, 14), -1), "no FindingStatus"),
        (np.zeros((0, 14), dtype=bool), np.zeros((0, 14), dtype=int), "no case"),
    ],
)
def test_shapes_and_values_that_do_not_fit(stated: NDArray[np.bool_], real: NDArray[np.int64], message: str) -> None:
    with pytest.raises(DataError, match=message):
        clinical_f1(stated, real, "present")


def test_lengths_that_differ_are_named() -> None:
    with pytest.raises(DataError, match="1 reports and 2 truths"):
        report_f1(["a"], ["a", "b"], "present")


def test_priors_are_the_best_constants() -> None:
    rng = np.random.default_rng(0)
    prevalence = np.linspace(0.02, 0.6, 14)
    validation = np.where(rng.random((500, 14)) < prevalence, PRESENT, ABSENT)
    constants = prior_findings(validation, "present")
    assert constants["prior_all"].all()
    assert constants["prior_frequent"][-1]
    assert not constants["prior_frequent"][0]
    scores = prior_scores(validation, validation, "present")
    best = scores["prior_frequent"].micro["14"].f1
    for _ in range(200):
        constant = np.tile(rng.random(14) < rng.random(), (500, 1))
        assert clinical_f1(constant, validation, "present").micro["14"].f1 <= best + 1e-12
        assert clinical_f1(constant, validation, "present").macro["14"].f1 <= scores["prior_all"].macro["14"].f1 + 1e-12


def test_a_finding_that_validation_never_shows_is_not_predicted() -> None:
    constants = prior_findings(status({"Edema": PRESENT}, {}), "present")
    assert constants["prior_all"].sum() == 1
    with pytest.raises(DataError, match="no validation case"):
        prior_findings(np.zeros((0, 14), dtype=int), "present")


def test_baseline_reports() -> None:
    training = [
        "Large right pleural effusion. The heart is enlarged.",
        "The lungs are clear. The heart is normal. No effusion.",
        "The lungs are clear. The heart is normal. No pneumothorax.",
        "Lungs clear.",
        "Large right pleural effusion. The heart is enlarged.",
        " ",
    ]
    reports = baseline_reports(training, 50, seed=1)
    assert set(reports["majority"]) == {training[0]}
    assert set(reports["normal_medoid"]) == {training[1]} or set(reports["normal_medoid"]) == {training[2]}
    assert set(reports["random_report"]) == set(training[:4])
    assert all(len(texts) == 50 for texts in reports.values())
    assert reports == baseline_reports(training, 50, seed=1)
    assert baseline_reports(["b", "a"], 1)["majority"] == ["b"], "ties go to the first"
    with pytest.raises(DataError, match="no training report"):
        baseline_reports(["", " "], 3)
