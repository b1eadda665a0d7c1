"""Sweeps without Ray: what is searched, what each trial gave, and what was learned. `ray_jobs/tune.py` runs the trials."""
