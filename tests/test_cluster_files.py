"""Every file of cluster/ against what reads it: Kubernetes, KubeRay, Ray Serve, Ray's launcher, Prometheus, Grafana, Docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from watched_metrics import watched

from ray_jobs.train_gauges import CHECKPOINT_TIME, GAUGES, RECORD_TIME
from serve.configured import application
from serve.gateway.config import Figures, Limits, Retention, load_gateway_config, parse_gateway_config
from serve.gateway.metrics import GatewayMetrics
from serve.gateway.spool import Spool
from serve.settings import ServeSettings
from ssacl.cli import build_parser
from ssacl.config import load_config
from ssacl.errors import ConfigError
from ssacl.sweeps.config import load_sweep

ROOT = Path(__file__).parents[1]
CLUSTER, SCHEMAS = ROOT / "cluster", ROOT.parent / "shared" / "schemas"
KUBERNETES = "1.30"
MANIFESTS = [
    (path.name, document)
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
NAMES = [f"{name}:{document['kind']}:{document['metadata']['name']}" for name, document in MANIFESTS]
DOCKERFILES = sorted((CLUSTER / "docker").glob("Dockerfile*"))


def pod_specs(tree: Any) -> list[dict[str, Any]]:
    """Every pod template's spec in a manifest."""
    if isinstance(tree, list):
        return [spec for item in tree for spec in pod_specs(item)]
    if not isinstance(tree, dict):
        return []
    own = [tree["template"]["spec"]] if "containers" in tree.get("template", {}).get("spec", {}) else []
    return own + [spec for value in tree.values() for spec in pod_specs(value)]


def test_there_is_all_that_a_deployment_needs() -> None:
    kinds = {document["kind"] for _, document in MANIFESTS}
    assert {"RayCluster", "RayJob", "RayService", "PodDisruptionBudget", "NetworkPolicy", "Service", "Ingress"} <= kinds
    assert {document["metadata"]["name"] for _, document in MANIFESTS if document["kind"] == "RayJob"} == {
        "ssacl-train",
        "ssacl-tune",
        "ssacl-ingest",
    }


@pytest.mark.parametrize(("name", "document"), MANIFESTS, ids=NAMES)
def test_kubernetes_would_take_it(name: str, document: dict[str, Any]) -> None:
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    for spec in pod_specs(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "document"), [item for item in MANIFESTS if item[1]["apiVersion"] == "ray.io/v1"])
def test_kuberay_would_take_it(name: str, document: dict[str, Any]) -> None:
    schema = SCHEMAS / f"{document['kind'].lower()}s.v1.json"
    if not schema.is_file():
        pytest.skip(f"no {schema.name} beside the checkout: KubeRay's schemas are not part of it")
    validator = jsonschema.Draft202012Validator(closed(json.loads(schema.read_text(encoding="utf-8"))["schema"]))
    assert problems(validator, document) == []
    assert problems(validator, {**document, "spec": {**document["spec"], "unknown": 1}}) != []


def problems(validator: Any, tree: Any) -> list[str]:
    """Where a tree leaves its schema. `jsonschema.validate` would check these large schemas themselves each time."""
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(tree)]


def closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as a strict API server does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tree = {key: closed(value) for key, value in schema.items()}
    fixed = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and schema.get("type") == "object"
    return {**tree, "additionalProperties": False} if fixed and not schema.get("x-kubernetes-preserve-unknown-fields") else tree


@pytest.mark.parametrize(("name", "document"), MANIFESTS, ids=NAMES)
def test_pods_run_without_rights_and_with_limits(name: str, document: dict[str, Any]) -> None:
    for spec in pod_specs(document):
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or name == "endpoint.yaml"
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"]
            assert all("value" not in item for item in container.get("env", ())), "values of variables belong into Secrets"


def test_selectors_meet_pods() -> None:
    labels = [template["metadata"]["labels"] for _, document in MANIFESTS for template in templates(document)]
    for _, document in MANIFESTS:
        wanted = {"Service": "selector", "PodDisruptionBudget": "selector", "NetworkPolicy": "podSelector"}.get(document["kind"])
        if wanted:
            selector = document["spec"][wanted]
            selector = selector.get("matchLabels", selector)
            assert any(selector.items() <= own.items() for own in labels), document["metadata"]["name"]


def templates(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, list):
        return [found for item in tree for found in templates(item)]
    if not isinstance(tree, dict):
        return []
    own = [tree["template"]] if "spec" in tree.get("template", {}) else []
    return own + [found for value in tree.values() for found in templates(value)]


def test_entrypoints_of_jobs_are_commands_that_this_release_has() -> None:
    for _, document in MANIFESTS:
        if document["kind"] == "RayJob":
            words = document["spec"]["entrypoint"].split()
            assert words.pop(0) == "ssacl"
            options = build_parser().parse_args(words)
            if options.command == "train":
                config = load_config(ROOT / options.config, options.overrides)
                group = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
                assert group["replicas"] == config.run.num_train_workers
            elif options.command == "tune":
                load_sweep(ROOT / options.config, options.overrides, {"storage_url": options.storage})


def test_serve_takes_the_configuration_and_both_copies_are_one() -> None:
    tree = yaml.safe_load((CLUSTER / "serve.yaml").read_text(encoding="utf-8"))
    service = next(document for _, document in MANIFESTS if document["kind"] == "RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == tree
    application = ServeDeploySchema.model_validate(tree).applications[0]
    assert application.import_path == "serve.configured:application"
    settings = ServeSettings.parse(application.args)
    # The one way to another model; nothing in the file names a version, or a promotion would change nothing.
    assert settings.checkpoint_url.endswith("models@stable")
    assert not application.deployments
    # The file itself changes without a failed request only where another replica answers meanwhile.
    assert settings.min_replicas >= 2
    # Records with the request's id, as the gateway writes them.
    assert tree["logging_config"] == {"encoding": "JSON"}
    # Whoever reaches the address is asked who it is, the gateway too.
    settings.service.check_exposure(tree["http_options"]["host"])
    gateway = next(document for _, document in MANIFESTS if document["kind"] == "ConfigMap")["data"]["gateway.yaml"]
    assert yaml.safe_load(gateway)["endpoint"]["authorization_env"]


def test_the_gateway_takes_its_configuration(tmp_path: Path) -> None:
    content = next(document for _, document in MANIFESTS if document["kind"] == "ConfigMap")["data"]["gateway.yaml"]
    (tmp_path / "gateway.yaml").write_text(content)
    config = load_gateway_config(tmp_path / "gateway.yaml")
    assert config.port == 11112
    assert config.audit_file
    assert config.web
    assert config.web.access.is_on
    assert config.web.tls


def test_prometheus_looks_where_the_gateway_gives_its_figures() -> None:
    tree = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yml").read_text())
    (scrape,) = (item for item in tree["scrape_configs"] if item["job_name"] == "gateway")
    default = Figures()
    assert scrape["static_configs"] == [{"targets": [f"{default.host}:{default.port}"]}]


@pytest.mark.parametrize("path", sorted((CLUSTER / "ray-up").glob("*.yaml")), ids=lambda path: path.name)
def test_rays_launcher_takes_it(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    # As `ray up` does: lists of own machines become a node type before the schema is asked.
    tree = prepare_config(yaml.safe_load(path.read_text(encoding="utf-8")))
    validator = jsonschema.Draft7Validator(schema)
    assert problems(validator, tree) == []
    assert problems(validator, {**tree, "unknown": 1}) != []


def test_ray_has_one_version_here_in_the_lock_and_in_every_manifest() -> None:
    versions = set(re.findall(r'rayVersion: "([\d.]+)"', "".join(path.read_text() for path in CLUSTER.rglob("*.yaml"))))
    versions |= set(re.findall(r"^ray==([\d.]+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    versions |= set(re.findall(r"ray\[[\w,]+\]==([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    assert versions == {ray.__version__}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_small_and_without_root(path: Path) -> None:
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    named = [line.partition(" ")[0] for line in lines]
    assert re.fullmatch(r"FROM [\w./-]+:\d+\.\d+\.\d+[\w.-]*", lines[0])
    assert "ADD" not in named
    assert "MAINTAINER" not in named
    users = [index for index, line in enumerate(lines) if line.startswith("USER ")]
    assert lines[users[-1]] == "USER 1000:1000"
    assert not any(line.startswith("RUN") for line in lines[users[-1] :])
    assert named.count("HEALTHCHECK") == named.count("CMD") == named.count("ENTRYPOINT") == 1
    assert next(line for line in lines if line.startswith("SHELL")) == 'SHELL ["/bin/bash", "-o", "pipefail", "-c"]'
    for line in lines:
        if line.startswith("RUN"):
            assert "sudo" not in line
            assert line.count("apt-get install") == line.count("--no-install-recommends") == line.count("rm -rf /var/lib/apt/lists")
            assert line.count("pip install") == line.count("--no-cache-dir")
            # Whatever is installed is in the lock, or is this tree.
            assert "pip install" not in line or "requirements.lock" in line or line.endswith("--editable .")
        if line.startswith(("CMD", "ENTRYPOINT", "SHELL")):
            json.loads(line.partition(" ")[2])
        if line.startswith("COPY"):
            for source in [word for word in line.split()[1:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists()
                assert f"!{source.rstrip('/')}" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("path", sorted((CLUSTER / "storage").glob("*.json")), ids=lambda path: path.name)
def test_policies_name_what_they_allow(path: Path) -> None:
    for statement in json.loads(path.read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in statement["Action"])
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        assert all(resource.startswith("arn:aws:s3:::BUCKET") for resource in resources)
        if statement["Action"] == ["s3:ListBucket"]:
            assert statement["Condition"]["StringLike"]["s3:prefix"]
        else:
            assert all("/" in resource.removeprefix("arn:aws:s3:::") for resource in resources)
    if path.name == "endpoint-policy.json":
        assert "Put" not in path.read_text()
        assert "Delete" not in path.read_text()


def test_the_slurm_script_is_a_script() -> None:
    path = CLUSTER / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.external
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_takes_rules_and_configuration(arguments: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (make setup-servers)")
    done = subprocess.run(["promtool", *arguments], cwd=CLUSTER / "monitoring", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.external
def test_prometheus_takes_the_configuration_for_kubernetes(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (make setup-servers)")
    tree = yaml.safe_load((CLUSTER / "monitoring" / "prometheus-kubernetes.yml").read_text())
    # Debian's build cannot discover pods; everything else in the file is checked.
    for scrape in tree["scrape_configs"]:
        assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        scrape["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(tree))
    command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ports = [
        port for _, document in MANIFESTS for spec in pod_specs(document) for each in spec["containers"] for port in each.get("ports", ())
    ]
    gateway = next(document for _, document in MANIFESTS if document["kind"] == "ConfigMap")["data"]["gateway.yaml"]
    figures = parse_gateway_config(gateway).metrics
    assert figures is not None
    assert {port["containerPort"] for port in ports if port.get("name") == "metrics"} == {8080, figures.port}


def exported(folder: Path) -> set[str]:
    """Metrics that this release exports: its own gauges, the gateway's, and those that the installed Ray knows by name."""
    spool = Spool(folder, Limits(), Retention())
    gateway = re.findall(r"^# TYPE (\w+)", GatewayMetrics(spool).text().decode(), re.MULTILINE)
    spool.close()
    own = {f"ray_{name}" for name, _ in GAUGES.values()} | {f"ray_{RECORD_TIME}", f"ray_{CHECKPOINT_TIME}"}
    package = Path(ray.__file__).parent
    sources = [*(package / "serve" / "_private").glob("*.py"), package / "dashboard" / "modules" / "reporter" / "reporter_agent.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(r"[\"'](serve_[a-z0-9_]+|node_[a-z0-9_]+)[\"']", text))
    # Those of the proxies are put together from the protocol's name.
    named |= {name.format("http") for name in re.findall(r"f\"(serve_num_\{.*?)\"", text) for name in [re.sub(r"\{.*?\}", "{}", name)]}
    named |= {re.sub(r"\{.*?\}", "http", name) for name in re.findall(r"f\"(serve_\{.*?)\"", text)}
    return own | set(gateway) | {f"ray_{name}{suffix}" for name in named for suffix in ("", "_total", "_bucket")}


def test_dashboards_and_alerts_read_only_what_is_exported(tmp_path: Path) -> None:
    known, read = exported(tmp_path), watched()
    for path in (CLUSTER / "monitoring" / "grafana").glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(read) == 3
    for name, metrics in read.items():
        assert metrics
        assert metrics - known == set(), name


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((CLUSTER / "monitoring" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            document = rule["annotations"]["runbook"].partition(":")[0]
            assert (ROOT / document).is_file()


def test_serve_builds_the_application_of_a_file() -> None:
    service = {"access": {"keys_file": "keys.json"}}
    arguments = {"checkpoint_url": "s3://bucket/models@stable", "min_replicas": 2, "service": service}
    # Serve itself passes the arguments of a file so, and refuses builders of several parameters.
    built = call_user_app_builder_with_args_if_necessary(application, arguments)
    replicas = built._bound_deployment.init_args[0]._bound_deployment
    # Not the version that the channel names now: replicas follow it.
    assert replicas.user_config["checkpoint_url"] == "s3://bucket/models@stable"
    assert built._bound_deployment.init_args[1]["min_replicas"] == 2
    with pytest.raises(ConfigError, match="max_replica:"):
        application({**arguments, "max_replica": 3})
    with pytest.raises(ConfigError, match="no access is set up"):
        application({"checkpoint_url": "s3://bucket/models@stable"})
