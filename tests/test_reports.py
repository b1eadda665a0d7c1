"""Sections, sentences and laterality of report text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssacl.data.reports import Sections, can_swap_laterality, split_sections, split_sentences, swap_laterality, training_text
from ssacl.errors import ConfigError

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with ?pleural effusion  // ?pleural effusion

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS:

 Cardiac size cannot be evaluated.  Large left pleural effusion is new.  Small
 right effusion is new.

 IMPRESSION:

 Large left pleural effusion.
"""
NO_FINDINGS_HEADER = """ FINAL REPORT
 HISTORY:  Fever, rule out pneumonia.

 COMPARISON:  None.

 Frontal and lateral views of the chest were obtained. No focal consolidation is
 seen.

 IMPRESSION:  No acute process.
"""


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        (
            MIMIC,
            "Cardiac size cannot be evaluated. Large left pleural effusion is new. Small right effusion is new.",
            "Large left pleural effusion.",
        ),
        (
            NO_FINDINGS_HEADER,
            "Frontal and lateral views of the chest were obtained. No focal consolidation is seen.",
            "No acute process.",
        ),
        ("The lungs are clear.\nHeart size is normal.", "The lungs are clear. Heart size is normal.", ""),
        ("Indication: cough. Findings: Lungs are clear. Impression: Normal chest.", "Lungs are clear.", "Normal chest."),
        ("History: pneumonia.\nReport: Clear lungs.\nConclusion: Normal.", "Clear lungs.", "Normal."),
        ("AP CHEST, 5:12 A.M., ___:\n Tubes unchanged.\nIMPRESSION: Stable.", "Tubes unchanged.", "Stable."),
        ("REFERRING CLINIC: Ward 7\nFINDINGS: No effusion.", "No effusion.", ""),
        ("FINDINGS AND IMPRESSION: No effusion.", "No effusion.", ""),
        ("FINDINGS\nLungs clear.\nIMPRESSION\nNormal.", "Lungs clear.", "Normal."),
        (
            "                    FINAL REPORT\n Frontal view shows clear lungs.\n\n IMPRESSION:  Normal.\n",
            "Frontal view shows clear lungs.",
            "Normal.",
        ),
        (
            "   FINAL REPORT\n AP CHEST, 5:46 A.M., ___\n\n HISTORY:  Transplant.\n\n IMPRESSION:  Compared to ___:\n\n Edema.\n",
            "",
            "Compared to ___: Edema.",
        ),
        (
            " WET READ: ___ ___ 8:41 PM\n  No tube.\n\n Checked.\n ____________\n   FINAL REPORT\n INDICATION:  Tube.\n\n Tube in place.\n",
            "Tube in place.",
            "",
        ),
        (
            "  FINAL ADDENDUM\n ADDENDUM:  Told Dr. ___ at 2:35 p.m.\n\n A second note.\n _______\n  FINAL REPORT\n FINDINGS:  Clear.\n",
            "Clear.",
            "",
        ),
        ("FINDINGS: Clear.\nIMPRESSION: Normal.\n\nADDENDUM: Late note.\n\nDictated by: Dr. ___", "Clear.", "Normal."),
        ("IMPRESSION: Nodule.\n\nRECOMMENDATION(S):  Chest CT.\n\nNOTIFICATION:  Dr. ___ at 3 p.m.\n", "", "Nodule."),
        (
            "FINDINGS:\n LUNGS:  Clear.\n HEART:  Enlarged.\nFINAL IMPRESSION: Large heart.",
            "LUNGS: Clear. HEART: Enlarged.",
            "Large heart.",
        ),
        ("IMPRESSION:\n LUNGS: Clear.\n", "", "LUNGS: Clear."),
        ("Findings - Clear lungs\nImpression \u2013 Normal", "Clear lungs", "Normal"),
        ("FINDINGS:Clear lungs.IMPRESSION:Normal.", "Clear lungs.", "Normal."),
        ("TYPE OF EXAMINATION: Chest.\n\nFINDINGS:\r\n Clear.\r\nIMPRESSION:\r\n Normal.", "Clear.", "Normal."),
        (
            "PROVISIONAL FINDINGS IMPRESSION (PFI): ___ 9:30 AM\n Effusion.\n\n ______\n FINAL REPORT\n HISTORY: x.\n\n Clear lungs seen.",
            "Clear lungs seen.",
            "",
        ),
        ("Comparison: None. Indication: Pain, XXXX. Findings/Impression: No effusion.", "No effusion.", ""),
        ("", "", ""),
    ],
)
def test_sections(text: str, findings: str, impression: str) -> None:
    assert split_sections(text) == Sections(findings, impression)


def test_history_never_reaches_the_sections() -> None:
    sections = split_sections(MIMIC)
    assert "woman" not in sections.findings + sections.impression


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("1. Bullous emphysema. 2. Probably scarring.", ["Bullous emphysema.", "Probably scarring."]),
        ("1) No effusion\n2) Normal heart", ["No effusion", "Normal heart"]),
        ("Discussed with Dr. Smith at 3:40 p.m. on ___. No effusion.", ["Discussed with Dr. Smith at 3:40 p.m. on ___.", "No effusion."]),
        ("A 2.5 cm nodule. Heart is normal.", ["A 2.5 cm nodule.", "Heart is normal."]),
        ("Nodule of 12 mm. in size.", ["Nodule of 12 mm. in size."]),
        ("Opacity in the apex.There are streaky opacities.", ["Opacity in the apex.", "There are streaky opacities."]),
        ("XXXX XXXX XXXX. There is ___ effusion.", ["XXXX XXXX XXXX.", "There is ___ effusion."]),
        ("Atelectasis vs. pneumonia. Grade 2. No effusion.", ["Atelectasis vs. pneumonia.", "Grade 2.", "No effusion."]),
        ("lungs are clear. heart is normal", ["lungs are clear.", "heart is normal"]),
        ("Is this pneumonia? Clear lungs.", ["Is this pneumonia?", "Clear lungs."]),
        ("Seen by Dr. A. Jones. ___.", ["Seen by Dr. A. Jones."]),
        ("1. Effusion 2. Edema of grade 2. 3. 1.5 cm nodule", ["Effusion", "Edema of grade 2.", "1.5 cm nodule"]),
        ("1.No effusion.2.No nodule", ["No effusion.", "No nodule"]),
        ("Grade 1. Next 2. Last", ["Grade 1.", "Next 2.", "Last"]),
        ("E.g. a mass, approx. 1.5 cm, i.e. small. Pt. is rotated.", ["E.g. a mass, approx. 1.5 cm, i.e. small.", "Pt. is rotated."]),
        ("R. lung is clear. Seen in the L. base. ", ["R. lung is clear.", "Seen in the L. base."]),
        ("Clear XXXX.There is ___.No mass .No effusion", ["Clear XXXX.", "There is ___.", "No mass .", "No effusion"]),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.text(alphabet="abN .?!:;\n123()-,_X\u2022", max_size=60))
def test_sentences_lose_no_letter(text: str) -> None:
    assert [letter for letter in " ".join(split_sentences(text)) if letter.isalpha()] == [letter for letter in text if letter.isalpha()]
    assert all(sentence == sentence.strip() != "" for sentence in split_sentences(text))


BODIES = {
    "INDICATION": "Fever, rule out pneumonia",
    "HISTORY": "Old man with: cough",
    "TECHNIQUE": "PA and lateral views",
    "COMPARISON": "___ at 3:40 p.m.",
    "ADDENDUM": "Late note. Told Dr. ___",
    "RECOMMENDATION(S)": "Chest CT",
    "NOTIFICATION": "Called by Dr. XXXX",
}


@given(
    st.permutations([*BODIES, "FINDINGS", "IMPRESSION"]),
    st.sampled_from([("", ":  ", "\n\n "), (" ", ":\n\n ", "\n\n"), ("", ": ", "\n")]),
    st.booleans(),
)
def test_only_findings_and_impression_are_kept_in_any_order(order: list[str], layout: tuple[str, str, str], lower: bool) -> None:
    start, colon, gap = layout
    bodies = BODIES | {"FINDINGS": "Clear lungs. 2.5 cm ___ nodule.", "IMPRESSION": "1. Nodule. 2. No effusion."}
    text = gap.join(f"{start}{name.title() if lower else name}{colon}{bodies[name]}" for name in order)
    assert split_sections(text) == Sections("Clear lungs. 2.5 cm ___ nodule.", "1. Nodule. 2. No effusion.")


def test_sections_keep_list_items_apart() -> None:
    assert split_sentences(split_sections("IMPRESSION:\n 1. No effusion\n 2. Normal heart\n").impression) == ["No effusion", "Normal heart"]


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("Right lower lobe opacity.", "Left lower lobe opacity."),
        ("LEFT effusion, right-sided tube, leftward shift", "RIGHT effusion, left-sided tube, rightward shift"),
        ("The right atrium and left ventricular contour.", "The right atrium and left ventricular contour."),
        ("Right heart border is obscured; right heart failure.", "Left heart border is obscured; right heart failure."),
        ("Mild dextroscoliosis of the spine", "Mild levoscoliosis of the spine"),
        ("bright copyright leftover", "bright copyright leftover"),
        ("R and L, RLL, LUL, RIJ line", "L and R, LLL, RUL, LIJ line"),
        ("Rt. base, lt lung, R/L, L > R.", "Lt. base, rt lung, L/R, R > L."),
        ("R/O effusion; L-spine, L spine, 2 L of oxygen, L1, Dr. R. Roe", "R/O effusion; L-spine, L spine, 2 L of oxygen, L1, Dr. R. Roe"),
        ("Bilateral, bibasilar and biapical", "Bilateral, bibasilar and biapical"),
        ("right and left lungs; right and left atrium", "left and right lungs; right and left atrium"),
    ],
)
def test_swap(text: str, swapped: str) -> None:
    assert swap_laterality(text) == swapped
    assert swap_laterality(swapped) == text


WORDS = [
    "right",
    "Left",
    "LEFT",
    "lung",
    "atrium",
    "heart",
    "border",
    "and",
    "-sided",
    ",",
    "the",
    "R",
    "L",
    "RLL",
    "LUL",
    "Rt",
    "lt",
    ".",
    "/O",
]
WORDS += ["spine", "2", "RML", "bilateral", "___", "XXXX", "dextro", "scoliosis", "/", "R/O", "L-spine"]


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["", " ", "-"])), max_size=12))
def test_swap_is_its_own_inverse(parts: list[tuple[str, str]]) -> None:
    text = "".join(word + gap for word, gap in parts)
    assert swap_laterality(swap_laterality(text)) == text


@given(st.text(alphabet="rRlLtTUigheft0 .,/()-_>'sided", max_size=40))
def test_swap_is_its_own_inverse_on_any_text(text: str) -> None:
    assert swap_laterality(swap_laterality(text)) == text


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("RLL opacity", True),
        ("R > L", True),
        ("R-sided tube", True),
        ("Right base opacity", True),
        ("Bilateral effusions", True),
        ("RML opacity", False),
        ("lingular opacity", False),
        ("Nodule in the R. base", False),
        ("Larger on the R.", True),
        ("status post RT", False),
    ],
)
def test_can_swap(text: str, can: bool) -> None:
    assert can_swap_laterality(text) is can


def test_training_text() -> None:
    sections = Sections("Lungs are clear", "Normal chest.")
    assert training_text(sections, "both") == "Lungs are clear. Normal chest."
    assert training_text(sections, "impression") == "Normal chest."
    assert training_text(Sections("", ""), "both") == ""
    with pytest.raises(ConfigError, match="expected findings"):
        training_text(sections, "history")  # type: ignore[arg-type]
