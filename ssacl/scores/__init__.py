"""Measures of reports and maps that need no truth: evaluation and validation in training share them."""
