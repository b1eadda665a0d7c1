"""Procedural frontal chest radiographs with anatomy, findings and reports: the embedded data set.

Training sees pictures and reports only. The truth (masks, true findings) is for `ssacl.evaluation` alone.
"""

from ssacl.phantom.findings import TrueFinding
from ssacl.phantom.study import PhantomStudy, StudyTruth, generate_study
from ssacl.phantom.tree import TreeSummary, write_dicom_tree
from ssacl.phantom.truth import TRUTH_SUFFIX, PhantomTruth, truth_folder

__all__ = [
    "TRUTH_SUFFIX",
    "PhantomStudy",
    "PhantomTruth",
    "StudyTruth",
    "TreeSummary",
    "TrueFinding",
    "generate_study",
    "truth_folder",
    "write_dicom_tree",
]
