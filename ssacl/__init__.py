"""SS-ACL: chest X-ray reports with evidence, learned without expert boxes (arXiv 2509.25963)."""

__version__ = "0.1.0"
