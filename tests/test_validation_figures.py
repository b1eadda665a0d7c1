"""Figures of reports and maps at each validation of a run."""

from __future__ import annotations

from pathlib import Path

from training_set import tiny_config, write_training_set

from ssacl.evaluation.mirror import mirror_scores
from ssacl.evaluation.quick import final_figures
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

STAGES = [{"kind": "contrastive", "num_steps": 4}, {"kind": "findings", "num_steps": 2}, {"kind": "generation", "num_steps": 3}]


def test_figures_are_those_of_the_model_and_change_nothing(tmp_path: Path) -> None:
    data = write_training_set(tmp_path / "set")
    outcomes = {}
    for name, num_films in (("plain", 0), ("scored", 3)):
        run = {"name": name, "num_figure_films": num_films, "validate_every_steps": 2, "stages": STAGES}
        outcomes[name] = train(tiny_config(data, tmp_path / "runs", run=run), LogReporter())
    plain, scored = (outcomes[name].manifest["files"]["model.safetensors"] for name in ("plain", "scored"))
    assert plain == scored, "to look at the model is not to change it"
    checks = [record for record in outcomes["scored"].metrics if record["event"] == "validation"]
    assert [sorted(record["figures"]) for record in checks] == [["mirror_agreement"]] * 3 + [["findings_f1", "mirror_agreement"]] * 2
    assert not any("figures" in record for record in outcomes["plain"].metrics)
    model = outcomes["scored"].model_url
    expected = mirror_scores(model, data, "val", limit=3)["maps"]["agreement"]["value"]
    assert checks[-1]["figures"]["mirror_agreement"] == expected
    tested = final_figures(model, str(data), 4)
    assert tested["mirror_agreement"] == mirror_scores(model, data, "test")["maps"]["agreement"]["value"]
    assert 0 <= tested["findings_f1"] <= 1
    assert outcomes["scored"].manifest["metrics"]["validation"]["generation"]["findings_f1"] == checks[-1]["figures"]["findings_f1"]
