"""What the chart renders, by the engine that Helm uses; and a server that is started as a rendered pod says.

There is no cluster here: that Kubernetes takes the documents is shown by its own schemas, that they belong together by
their selectors, and that pods work by one process with a pod's command, variables, files and probes.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile

import grpc
import kubernetes_validate
import pytest
import trustme
import yaml
from grpc_health.v1 import health_pb2

from queryselect import Client, Unauthenticated
from queryselect_service import settings
from tests.chart.kubelet import ENTRYPOINT, Node, probe, project, run
from tests.chart.rendering import CASES, CHART, ROOT, Refused, Rendered, render, render_with
from tests.contract.test_chart import ROWS, VALUES, leaves
from tests.slow import tools
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
#: Of others: Kubernetes' schemas do not have them.
FOREIGN = {
    "monitoring.coreos.com/v1": {"ServiceMonitor", "PrometheusRule"},
    "keda.sh/v1alpha1": {"ScaledObject"},
}
SERVING = health_pb2.HealthCheckResponse.SERVING
README, KUBERNETES, CHARTS = (
    (ROOT / name).read_text() for name in ("README.md", "docs/kubernetes.md", "helm/queryselect/README.md")
)
EVERY = pytest.mark.parametrize("case", CASES)
#: With this Python first.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def releases() -> dict[str, Rendered]:
    return {case: render(*files) for case, files in CASES.items()}


@pytest.fixture
def release(releases, case) -> Rendered:
    return releases[case]


def blocks(kind: str, *pages: str) -> list[str]:
    return [each for page in pages for each in re.findall(rf"```{kind}\n(.+?)```", page, re.DOTALL)]


def labels(document) -> dict[str, str]:
    return document["metadata"]["labels"]


def selects(selector: dict[str, str], found: dict[str, str]) -> bool:
    return selector.items() <= found.items()


def scalars(value) -> list:
    """All that is no table and no list."""
    if isinstance(value, dict | list):
        return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in scalars(each)]
    return [value]


def target(release: Rendered) -> str:
    """Whom `helm test` calls."""
    (test,) = release.all("Pod")
    (found,) = (each["value"] for each in test["spec"]["containers"][0]["env"] if each["name"] == "TARGET")
    return found


def told(release: Rendered) -> settings.Settings:
    """The settings that the server finds in its container, where those of the image are too."""
    image = dict(re.findall(r"\b(QUERYSELECT_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    variables = image | {each["name"]: each["value"] for each in release.container["env"] if "value" in each}
    assert variables["QUERYSELECT_CONFIG"] == "/etc/queryselect/settings/settings.toml"
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(release.one("ConfigMap")["data"]["settings.toml"])
        file.flush()
        return settings.load([], variables | {"QUERYSELECT_CONFIG": file.name})


# What is rendered


@pytest.mark.parametrize("version", ["1.27", kubernetes_validate.latest_version()])
@EVERY
def test_kubernetes_takes_every_document(release, version):
    names = []
    for each in release.documents:
        if each["kind"] in FOREIGN.get(each["apiVersion"], ()):
            assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
        else:
            kubernetes_validate.validate(each, version, strict=True)
        assert each["metadata"]["namespace"] == "default"
        names.append((each["kind"], each["metadata"]["name"]))
        assert None not in scalars(each), names[-1]
    assert len(names) == len(set(names))


def test_the_oldest_version_is_the_one_that_the_chart_allows():
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == ">=1.27.0-0"


def test_every_value_is_set_by_a_values_file():
    given = [yaml.safe_load(file.read_text()) for files in CASES.values() for file in files]
    paths = {path for each in given for path in leaves(each)}
    for row in ROWS:
        assert any(f"{path}.".startswith(f"{row}.") for path in paths), row


@EVERY
def test_numbers_are_rendered_alike_however_helm_reads_them(release, case):
    assert render(*CASES[case], numbers=True).documents == release.documents


@EVERY
def test_what_selects_pods_selects_the_servers_and_no_others(release):
    server = release.deployment["spec"]["template"]["metadata"]["labels"]
    (test,) = release.all("Pod")
    selectors = [each["spec"]["selector"] for each in release.all("Service")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in release.all("PodDisruptionBudget")]
    selectors += [
        each["spec"]["podSelector"]["matchLabels"]
        for each in release.all("NetworkPolicy")
        if not each["metadata"]["name"].endswith("-helm-test")
    ]
    selectors.append(release.deployment["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selects(selector, server)
        assert not selects(selector, labels(test))
    for each in release.all("ServiceMonitor"):
        services = [s for s in release.all("Service") if selects(each["spec"]["selector"]["matchLabels"], labels(s))]
        (port,) = (end["port"] for end in each["spec"]["endpoints"])
        assert len([s for s in services if port in {p["name"] for p in s["spec"]["ports"]}]) == 1, "scraped once"
    for each in (*release.all("HorizontalPodAutoscaler"), *release.all("ScaledObject")):
        assert each["spec"]["scaleTargetRef"]["name"] == release.deployment["metadata"]["name"]
    for each in release.documents:
        assert selects(
            {"app.kubernetes.io/instance": "queryselect", "app.kubernetes.io/managed-by": "Helm"}, labels(each)
        )


@EVERY
def test_ports_are_those_that_the_server_listens_on(release):
    ports = {each["name"]: each["containerPort"] for each in release.container["ports"]}
    found = told(release)
    assert ports == {"grpc": found.port, "metrics": found.metrics_port, "health": found.health_port}
    main, headless = release.one("Service"), release.one("Service", "-headless")
    assert [each["targetPort"] for each in main["spec"]["ports"]] == ["grpc"], "metrics and health are not for everyone"
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is False
    assert {each["targetPort"] for each in headless["spec"]["ports"]} == {"grpc", "metrics"}
    (env,) = (
        each["value"] for each in release.all("Pod")[0]["spec"]["containers"][0]["env"] if each["name"] == "TARGET"
    )
    assert env == f"{main['metadata']['name']}.default.svc:{main['spec']['ports'][0]['port']}"


@pytest.mark.parametrize(
    ("kind", "secret", "main", "headless"),
    [
        ("ClusterIP", "", "kubernetes.io/h2c", "kubernetes.io/h2c"),
        ("ClusterIP", "x", "https", "https"),
        ("LoadBalancer", "", "kubernetes.io/h2c", "kubernetes.io/h2c"),
        ("LoadBalancer", "x", "tcp", "https"),
    ],
)
def test_meshes_and_clouds_are_told_what_a_port_speaks(kind, secret, main, headless):
    """By its name alone, a mesh would take TLS for plain HTTP/2. By "https", Azure's load balancer would ask for / ."""
    release = render_with({"service": {"type": kind}, "tls": {"existingSecret": secret}})
    for suffix, expected in (("", main), ("-headless", headless)):
        (port,) = (each for each in release.one("Service", suffix)["spec"]["ports"] if each["name"] == "grpc")
        assert port["appProtocol"] == expected


@EVERY
def test_the_server_is_told_the_settings_of_the_values(release):
    found, values = told(release), release.values
    assert found.told().items() >= values["settings"].items()
    assert bool(found.tls_cert) == bool(values["tls"]["existingSecret"])
    assert bool(found.tls_client_ca) == bool(values["tls"]["clientCASecret"])
    assert bool(found.token_file) == bool(values["auth"]["existingSecret"])
    assert found.device == ("cuda" if values["gpu"]["count"] else "cpu")
    mounted = {each["mountPath"] for each in release.container["volumeMounts"]}
    for path in (found.tls_cert, found.tls_key, found.tls_client_ca, found.token_file):
        assert not path or str(Path(path).parent) in mounted


def test_probes_ask_what_they_should_and_cuda_may_take_long_to_begin(releases):
    container = releases["defaults"].container
    services = {each: container[f"{each}Probe"]["grpc"]["service"] for each in ("startup", "liveness", "readiness")}
    assert services == {"startup": "", "liveness": "", "readiness": "queryselect.v1.SelectionService"}
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 300
    assert not {each for each in releases["minimal"].container if each.endswith("Probe")}


@EVERY
def test_pods_meet_the_restricted_standard_and_can_write_to_tmp_alone(release):
    for pod in (release.pod, release.all("Pod")[0]["spec"]):
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
        (container,) = pod["containers"]
        own = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"].items() >= own.items()
        assert [each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")] == ["/tmp"]
        assert not {each["name"] for each in pod["volumes"]} ^ {each["name"] for each in container["volumeMounts"]}
        for volume in pod["volumes"]:
            assert not {"hostPath"} & volume.keys()
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440
                assert pod["securityContext"]["fsGroup"] == 65532, "root's files otherwise"


@EVERY
def test_secrets_are_named_and_never_rendered(release):
    assert not release.all("Secret")
    assert {key for each in release.all("ConfigMap") for key in each["data"]} <= {"settings.toml", "queryselect.json"}
    volumes = {each["name"]: each.get("secret") for each in release.all("Pod")[0]["spec"]["volumes"]}
    assert volumes.get("ca", {"items": [{"key": "ca.crt", "path": "ca.crt"}]})["items"] == [
        {"key": "ca.crt", "path": "ca.crt"}
    ], "the server's key is not for the test's pod"


@pytest.mark.parametrize(("pre_stop", "grace", "whole"), [(5, 60, 80), (0, 0, 15), (10, 90.5, 116), (5, 3600, 3620)])
def test_a_pod_has_the_time_to_drain(pre_stop, grace, whole):
    release = render_with({"preStopSeconds": pre_stop, "settings": {"drain_grace": grace}})
    assert release.pod["terminationGracePeriodSeconds"] == whole
    (command,) = (release.container["lifecycle"]["preStop"]["exec"]["command"],)
    assert command == ["python", "-c", f"import time; time.sleep({pre_stop})"]
    assert pre_stop + grace + 15 <= whole < pre_stop + grace + 16


def test_changed_settings_roll_the_pods_and_nothing_else_does():
    def seen(values) -> str:
        annotations = render_with(values).deployment["spec"]["template"]["metadata"]["annotations"]
        return annotations["checksum/settings"]

    assert seen({"replicas": 5}) == seen({})
    assert len({seen({}), seen({"settings": {"max_rows": 9}}), seen({"gpu": {"count": 1}})}) == 3


@pytest.mark.parametrize("name", ["a", "queryselect-eu", "x" * 53, f"{'y' * 40}-queryselect", f"{'z' * 45}-z"])
def test_names_are_short_enough_and_do_not_meet(name):
    release = render(*CASES["hpa"], name=name)
    found = [(each["kind"], each["metadata"]["name"]) for each in release.documents]
    assert len(found) == len(set(found))
    for _, each in found:
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", each), each
    for each in release.documents:
        assert all(isinstance(value, str) and len(value) <= 63 for value in labels(each).values())
    assert release.one("Service", "-headless")
    # Kubernetes cuts a pod's name after 58 characters, before its own five; KEDA's query counts hyphens.
    assert len(release.deployment["metadata"]["name"] + "-0123456789-") <= 58


def test_a_release_called_test_stands_beside_one_that_is_not():
    values = {
        "networkPolicy": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "grafanaDashboard": {"enabled": True},
    }
    one, other = (
        {(each["kind"], each["metadata"]["name"]) for each in render_with(values, name=name).documents}
        for name in ("queryselect", "queryselect-test")
    )
    assert not one & other


@pytest.mark.parametrize(("count", "limits"), [(0, {}), (1, {"nvidia.com/gpu": 1}), (4, {"nvidia.com/gpu": 4})])
def test_gpus_are_asked_for_and_without_any_the_device_is_the_cpu(count, limits):
    release = render_with({"gpu": {"count": count}})
    assert release.container["resources"]["limits"] == {"memory": "2Gi", **limits}
    assert told(release).device == ("cuda" if count else "cpu")
    assert told(render_with({"gpu": {"count": count}, "settings": {"device": "cuda:0"}})).device == "cuda:0"


def test_the_values_for_gpus_take_the_image_with_cuda_and_need_no_spare_gpu(releases):
    plain, gpu = releases["defaults"], releases["gpu"]
    assert gpu.container["image"] == f"{plain.container['image']}-cuda"
    assert releases["gpus"].container["image"] == "queryselect:1.2.3-cuda"
    assert releases["keda"].container["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert gpu.deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert releases["gpus"].pod["runtimeClassName"] == "nvidia"
    assert releases["everything"].container["image"] == (
        "registry.example.org/queryselect@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    )


def test_as_many_threads_as_a_limit_of_cpu_has_cores(releases):
    limited = {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    assert limited in releases["gpus"].container["env"]
    assert "OMP_NUM_THREADS" not in {each["name"] for each in releases["defaults"].container["env"]}
    assert "cpu" not in releases["defaults"].container["resources"]["limits"]


@pytest.mark.parametrize(
    ("account", "made", "used"),
    [
        ({}, ["queryselect"], "queryselect"),
        ({"name": "reader"}, ["reader"], "reader"),
        ({"create": False}, [], "default"),
        ({"create": False, "name": "reader"}, [], "reader"),
    ],
)  # fmt: skip
def test_pods_have_the_service_account_that_is_made_or_named(account, made, used):
    release = render_with({"serviceAccount": account})
    assert [each["metadata"]["name"] for each in release.all("ServiceAccount")] == made
    assert [release.pod["serviceAccountName"], release.all("Pod")[0]["spec"]["serviceAccountName"]] == [used] * 2


def test_pods_that_are_all_made_anew_are_not_updated_in_turn_too():
    """Kubernetes takes rollingUpdate, which the chart has by default, with no other type."""
    release = render_with({"strategy": {"type": "Recreate"}})
    assert release.deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_what_is_spread_without_a_selector_is_the_releases_pods(releases):
    ours, given = releases["everything"].pod["topologySpreadConstraints"]
    assert ours["labelSelector"] == releases["everything"].deployment["spec"]["selector"]
    assert given["labelSelector"] == {"matchLabels": {"team": "studio"}}


@pytest.mark.parametrize("name", [name for name, told in VALUES.items() if told in ([], {}, "")])
def test_what_is_empty_may_also_be_null(name):
    assert render_with({name: None}).documents == render_with({}).documents


def test_variables_of_yours_take_the_place_of_the_charts():
    """Named twice, server-side apply refuses them."""
    yours = [{"name": "GRPC_VERBOSITY", "value": "DEBUG"}, {"name": "OMP_NUM_THREADS", "value": "2"}]
    release = render_with({"extraEnv": yours, "resources": {"limits": {"cpu": "4"}}})
    names = [each["name"] for each in release.container["env"]]
    assert len(names) == len(set(names))
    assert [each for each in release.container["env"] if each in yours] == yours


def test_labels_that_select_stay_as_they_are(releases):
    found = releases["everything"].deployment["spec"]["template"]["metadata"]["labels"]
    assert (found["app.kubernetes.io/name"], found["team"]) == ("queryselect", "studio")


# Scaling and watching


def test_one_thing_at_most_scales_and_then_the_deployment_says_no_number(releases):
    kinds = {case: [len(each.all(kind)) for kind in ("HorizontalPodAutoscaler", "ScaledObject")]
             for case, each in releases.items()}  # fmt: skip
    assert kinds.pop("hpa") == [1, 0]
    assert kinds.pop("keda") == [0, 1]
    assert set(map(tuple, kinds.values())) == {(0, 0)}
    for case, release in releases.items():
        assert ("replicas" in release.deployment["spec"]) == (case not in ("hpa", "keda"))
        assert bool(release.all("PodDisruptionBudget")) == (case in ("hpa", "keda", "everything"))


@pytest.mark.parametrize(
    ("replicas", "told", "budgets"), [(None, {}, 1), (0, {"replicas": 0}, 0), (2, {"replicas": 2}, 1)]
)
def test_without_a_number_of_pods_it_is_left_to_whoever_else_scales(replicas, told, budgets):
    release = render_with({"replicas": replicas})
    assert {key: value for key, value in release.deployment["spec"].items() if key == "replicas"} == told
    assert len(release.all("PodDisruptionBudget")) == budgets


@pytest.fixture(scope="module")
def scaled():
    """What KEDA is told by default."""
    values = {"by": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
    return render_with({"autoscaling": values}).one("ScaledObject")


def test_the_signal_is_the_wait_for_a_device_by_every_name(releases, scaled):
    """As the server, the autoscaler, KEDA and the adapter call it."""
    scaler = releases["hpa"].one("HorizontalPodAutoscaler")
    first, more = scaler["spec"]["metrics"]
    assert first["pods"]["target"] == {"type": "AverageValue", "averageValue": "2.5"}
    assert more["resource"]["name"] == "memory"
    (prometheus,) = scaled["spec"]["triggers"]
    assert prometheus["metricType"] == "AverageValue"
    assert prometheus["metadata"]["threshold"] == "5"
    (rule,) = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    named = (first["pods"]["metric"]["name"], prometheus["metadata"]["query"], rule["seriesQuery"])
    known = re.findall(r"^\| `(queryselect_\w+)` \| gauge", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    for each in named:
        assert re.findall(r"queryselect_\w+", each) == ["queryselect_queue_wait_seconds"]
    assert "queryselect_queue_wait_seconds" in known
    behaviors = scaler["spec"]["behavior"], scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert [each["scaleDown"].pop("stabilizationWindowSeconds") for each in behaviors] == [300, 600]
    assert behaviors[0] == behaviors[1]
    own, cron = releases["keda"].one("ScaledObject")["spec"]["triggers"]
    assert (own["metadata"]["query"], cron["type"]) == (releases["keda"].values["autoscaling"]["keda"]["query"], "cron")
    assert (scaler["spec"]["minReplicas"], scaled["spec"]["minReplicaCount"]) == (2, 1)


@pytest.fixture(scope="module")
def promtool() -> str:
    return str(tools.unpacked("prometheus") / "usr" / "bin" / "promtool")


def test_prometheus_understands_keda_and_the_adapter(promtool, scaled, tmp_path):
    (rule,) = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    asked = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.Series>>", "queryselect_queue_wait_seconds")
    expressions = [
        asked.replace("<<.LabelMatchers>>", 'namespace="default",pod=~"a|b"'),
        rule["seriesQuery"],
        scaled["spec"]["triggers"][0]["metadata"]["query"],
    ]
    rules = [{"record": f"asked:{number}", "expr": each} for number, each in enumerate(expressions)]
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert "3 rules found" in checked.stdout, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("pod", "counts"),
    [("queryselect-5d4f8b7c9-x2v7q", True), ("queryselect-eu-5d4f8b7c9-x2v7q", False), ("queryselect-test", False)],
)
def test_keda_asks_for_the_pods_of_its_release(scaled, pod, counts):
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (pattern,) = re.findall(r'pod=~"(.+?)"', query)
    assert 'namespace="default"' in query
    assert bool(re.fullmatch(pattern, pod)) == counts


def test_the_rules_are_the_files_and_prometheus_understands_them(promtool, releases, tmp_path):
    rules = releases["hpa"].one("PrometheusRule")
    assert labels(rules)["release"] == "prometheus"
    files = [yaml.safe_load(file.read_text()) for file in sorted((CHART / "files").glob("*.yaml"))]
    assert rules["spec"]["groups"] == [group for each in files for group in each["groups"]]
    assert "{{ $labels.instance }}" in json.dumps(rules), "for Prometheus, not for Helm"
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules["spec"]))
    checked = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_find_the_job_that_the_service_monitor_makes(releases):
    (end,) = releases["hpa"].one("ServiceMonitor")["spec"]["endpoints"]
    (relabelled,) = end["relabelings"]
    assert relabelled == {"targetLabel": "job", "replacement": "queryselect/default/queryselect"}
    for pattern in re.findall(r'job=~"(.+?)"', (CHART / "files" / "alerts.yaml").read_text()):
        assert re.fullmatch(pattern, relabelled["replacement"])


def test_the_dashboard_is_the_file(releases):
    found = releases["hpa"].one("ConfigMap", "-dashboard")
    assert labels(found).items() >= {"grafana_dashboard": "1", "folder": "queryselect"}.items()
    assert json.loads(found["data"]["queryselect.json"]) == json.loads((CHART / "files" / "dashboard.json").read_text())


def test_helm_test_runs_where_the_servers_do_and_keeps_to_quotas(releases):
    """Other nodes may have another architecture, or take no pods. Some quotas refuse what has no limits."""
    release = releases["everything"]
    (test,) = release.all("Pod")
    for key in ("nodeSelector", "tolerations"):
        assert test["spec"][key] == release.pod[key]
    assert test["spec"]["affinity"] == {"nodeAffinity": release.pod["affinity"]["nodeAffinity"]}
    resources = test["spec"]["containers"][0]["resources"]
    assert set(resources["limits"]) == set(resources["requests"]) == {"cpu", "memory"}


def test_helm_test_calls_where_the_network_lets_nobody_call(releases):
    """In a namespace that is closed by default it has no way out but this one."""
    release = releases["everything"]
    policy = release.one("NetworkPolicy", "-helm-test")
    (test,) = release.all("Pod")
    assert selects(policy["spec"]["podSelector"]["matchLabels"], labels(test))
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    dns, server = policy["spec"]["egress"]
    assert dns == release.one("NetworkPolicy")["spec"]["egress"][0]
    assert server["to"] == [{"podSelector": release.deployment["spec"]["selector"]}]
    (port,) = (each["containerPort"] for each in release.container["ports"] if each["name"] == "grpc")
    assert server["ports"] == [{"port": port}]


def test_only_those_who_are_chosen_reach_a_pod(releases):
    release, least = releases["everything"], releases["minimal"]
    (test,) = release.all("Pod")
    calls, scrapes = release.one("NetworkPolicy")["spec"]["ingress"]
    own, team = calls["from"]
    assert selects(own["podSelector"]["matchLabels"], labels(test)), "helm test may call"
    assert team == {"namespaceSelector": {"matchLabels": {"team": "studio"}}}
    assert (calls["ports"], scrapes["ports"]) == ([{"port": "grpc"}], [{"port": "metrics"}])
    dns, collector = release.one("NetworkPolicy")["spec"]["egress"]
    assert {(each["port"], each["protocol"]) for each in dns["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert collector["ports"] == [{"port": 4318}]
    policy = least.one("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert [len(rule["from"]) for rule in policy["spec"]["ingress"]] == [1], "an empty list would be everybody"


# What is refused


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"auth": {"existingSecret": "x"}}, "auth.existingSecret without tls.existingSecret: tokens would travel"),
        ({"tls": {"clientCASecret": "x"}}, "tls.clientCASecret needs tls.existingSecret"),
        ({"settings": {"port": 1}}, "settings.port is not for you to set: the pod's ports are fixed; service.port"),
        ({"settings": {"health_port": -1}}, "settings.health_port is not for you to set"),
        ({"settings": {"tls_cert": "/x"}}, "settings.tls_cert is not for you to set: set tls.existingSecret"),
        ({"settings": {"token_file": "/x"}}, "settings.token_file is not for you to set: set auth.existingSecret"),
        ({"extraEnv": [{"name": "QUERYSELECT_DEVICE"}]}, "extraEnv has QUERYSELECT_DEVICE: use settings.device"),
        ({"autoscaling": {"by": "keda"}}, "autoscaling.keda.serverAddress is needed: where KEDA asks Prometheus"),
        ({"settings": {"max_row": 5}}, "$.settings: Additional properties are not allowed ('max_row' was unexpected)"),
        ({"settings": {"drain_grace": None}}, "$.settings: 'drain_grace' is a required property"),
        ({"fullnameOverride": "1234"}, "no Service can be called 1234: set fullnameOverride to small letters,"),
        ({"fullnameOverride": "team.selection"}, "no Service can be called team.selection: set fullnameOverride"),
        ({"fullnameOverride": "Selection"}, "no Service can be called Selection: set fullnameOverride"),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources has nvidia.com/gpu: set gpu.count and"),
        ({"resources": {"limits": {"nvidia.com/mig-1g.5gb": 1}}}, "resources has nvidia.com/mig-1g.5gb: set gpu.count"),
        ({"resources": {"claims": [{"name": "gpu"}]}}, "$.resources: Additional properties are not allowed ('claims'"),
        ({"autoscaling": {"by": "hpa", "minReplicas": 5}}, "autoscaling.minReplicas is 5, and autoscaling.max"),
        ({"replicas": "two"}, "$.replicas: 'two' is not of type 'integer'"),
        ({"podAnotations": {}}, "$: Additional properties are not allowed ('podAnotations' was unexpected)"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_what_can_not_work_is_refused_in_words(values, told):
    with pytest.raises(Refused, match=re.escape(told)):
        render_with(values)


# A pod that runs, and what the pages tell


def shell(command: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Issued:
    """A CA, and of it what Secrets of type kubernetes.io/tls hold, as cert-manager writes them."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.root = {"ca.crt": self._ca.cert_pem.bytes()}

    def pair(self, name: str = "localhost") -> dict[str, bytes]:
        leaf = self._ca.issue_cert(name)
        chain = b"".join(each.bytes() for each in leaf.cert_chain_pems)
        return {"tls.crt": chain, "tls.key": leaf.private_key_pem.bytes(), **self.root}


def token(name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What a token file's Secret and a caller's hold, made by the command that the pages tell."""
    made = run(["queryselect", "token", name])
    assert made.returncode == 0
    return {"tokens.toml": made.stdout.encode()}, {"token": made.stderr.split()[-1].encode()}


@pytest.fixture(scope="module")
def secrets() -> dict[str, dict[str, bytes]]:
    ours, theirs = Issued(), Issued()
    tokens, test = token("studio")
    return {
        "selection-tls": ours.pair(),
        "selection-ca": ours.root,
        "selection-clients": theirs.root,
        "selection-test-client": theirs.pair("a-client"),
        "selection-tokens": tokens,
        "selection-test-token": test,
        "collector": {"headers": b"authorization=nobody"},
    }


ON_A_CPU = pytest.mark.parametrize("case", [case for case in CASES if case not in ("gpu", "gpus", "keda")])


@ON_A_CPU
def test_a_pod_starts_answers_its_probes_and_passes_helm_test(release, case, secrets, tmp_path):
    node = Node(tmp_path, release, secrets)
    (test,) = release.all("Pod")
    with node.serve(release.pod) as serving:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name in release.container:
                told = release.container[name]["grpc"]
                assert until(lambda told=told: probe(told, serving) == SERVING, 60), name
        said = node.run(test["spec"], f"localhost:{serving.port}")
    assert ("asks for a token" if case == "proxy" else "chose rows [1, 2]") in said


def test_helm_test_fails_where_something_is_wrong(releases, secrets, tmp_path):
    release, (test,) = releases["secure"], releases["secure"].all("Pod")
    node = Node(tmp_path / "secure", release, secrets)
    with node.serve(release.pod) as serving:
        where = f"localhost:{serving.port}"
        assert "chose rows" in node.run(test["spec"], where)
        wrong = (
            ("Unauthenticated", {"selection-test-token": token("studio")[1]}),
            ("Unavailable", {"selection-ca": Issued().root}),
            ("Unavailable", {"selection-test-client": Issued().pair()}),
        )
        for number, (error, instead) in enumerate(wrong):
            other = Node(tmp_path / str(number), release, secrets | instead)
            with pytest.raises(AssertionError, match=error):
                other.run(test["spec"], where)


def test_helm_test_of_a_chart_without_tokens_fails_where_one_is_asked_for(releases, secrets, tmp_path):
    release = releases["proxy"]
    with Node(tmp_path, release, secrets).serve(release.pod) as serving:
        plain = Node(tmp_path / "other", releases["defaults"], secrets)
        with pytest.raises(AssertionError, match="Unauthenticated"):
            plain.run(releases["defaults"].all("Pod")[0]["spec"], f"localhost:{serving.port}")


def test_secrets_that_change_are_used_without_a_restart(releases, secrets, tmp_path):
    """Changed as the kubelet changes them, in folders that are mounted as the chart says."""
    release, (test,) = releases["secure"], releases["secure"].all("Pod")
    node = Node(tmp_path / "before", release, secrets)
    found, renewed, (tokens, caller) = told(release), Issued(), token("studio-2")
    changed = secrets | {"selection-ca": renewed.root, "selection-test-token": caller}
    after = Node(tmp_path / "after", release, changed)
    with node.serve(release.pod) as serving:
        where = f"localhost:{serving.port}"
        assert "chose rows" in node.run(test["spec"], where)
        project(node.path(found.tls_cert).parent, renewed.pair())
        project(node.path(found.token_file).parent, tokens)

        def works(other: Node) -> bool:
            try:
                return "chose rows" in other.run(test["spec"], where)
            except AssertionError:
                return False

        assert until(lambda: works(after), 60)
        assert not works(node)


def test_what_a_pod_does_before_it_ends_can_be_run(releases):
    done = run(releases["minimal"].container["lifecycle"]["preStop"]["exec"]["command"])
    assert (done.returncode, done.stderr) == (0, "")


def test_helm_install_says_which_image_is_pulled_and_where_none_is_there_yet(releases):
    for release in releases.values():
        assert f"by the image {release.container['image']}." in release.notes
    assert "No image is published by this name" in releases["defaults"].notes
    assert "make image" not in releases["everything"].notes


@pytest.mark.parametrize("case", ["defaults", "proxy", "secure"])
def test_the_lines_that_helm_install_prints_make_a_selection(release, secrets, tmp_path):
    code = textwrap.dedent(release.notes.split("# and in Python\n")[1].partition("\n\n")[0])
    for name, content in (secrets["selection-test-client"] | secrets["selection-ca"]).items():
        (tmp_path / name.replace("tls", "client")).write_bytes(content)
    with Node(tmp_path / "node", release, secrets).serve(release.pod) as serving:
        assert code.count("localhost:50051") == 1
        code = code.replace("localhost:50051", f"localhost:{serving.port}")
        code = code.replace("qs_…", secrets["selection-test-token"]["token"].decode())
        assert shell('python -c "$CODE"', tmp_path, CODE=code, PATH=PATH).split() == ["[1", "2]"]


def test_the_ten_lines_of_the_readme_run_against_a_pod(releases, tmp_path):
    (code,) = blocks("python", README)
    with Node(tmp_path, releases["defaults"], {}).serve(releases["defaults"].pod) as serving:
        code = code.replace('Client("local:")', f'Client("localhost:{serving.port}")')
        assert f"localhost:{serving.port}" in code
        assert shell('python -c "$CODE"', tmp_path, CODE=code, PATH=PATH).count("label row") == 5


@pytest.mark.parametrize("values", [each for each in blocks("yaml", KUBERNETES, CHARTS) if "apiVersion" not in each])
def test_values_on_the_pages_are_values(values):
    assert render_with(yaml.safe_load(values)).documents


def test_commands_of_helm_on_the_pages_have_files_and_values_that_are_there(tmp_path):
    pages = (README, KUBERNETES, CHARTS)
    lines = [line for block in blocks("sh", *pages) for line in block.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("helm ")]
    installs = [each for each in commands if each[0] == "install"]
    assert len(installs) >= 4
    for _, name, chart, *options in installs:
        assert (ROOT / chart / "Chart.yaml").exists()
        given = {flag: value for flag, value in pairwise(options) if flag.startswith("-")}
        path, _, value = given["--set"].partition("=")
        top, key = path.split(".")
        (tmp_path / "set.yaml").write_text(yaml.safe_dump({top: {key: value}}))
        files = [ROOT / given["-f"]] if "-f" in given else []
        release = render(*files, tmp_path / "set.yaml", name=name, namespace=given.get("--namespace", "default"))
        assert release.container["image"].startswith(f"{value}:")
        assert f"deployment/{release.deployment['metadata']['name']}\n" in "".join(pages)
    assert {each[0] for each in commands} == {"install", "test"}
    built = re.findall(
        r"^make image (TARGET=cuda )?IMAGE=registry\.example\.org/queryselect:(\S+)", "\n".join(lines), re.MULTILINE
    )
    pushed = re.findall(r"^docker push registry\.example\.org/queryselect:(\S+)", "\n".join(lines), re.MULTILINE)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert {tag for _, tag in built} >= {*pushed} == {version, f"{version}-cuda"}
    assert all(tag == f"{version}{'-cuda' if cuda else ''}" for cuda, tag in built)


def test_the_certificate_on_the_page_names_what_is_called(releases):
    (certificate,) = (yaml.safe_load(each) for each in blocks("yaml", KUBERNETES) if "apiVersion" in each)
    assert (certificate["apiVersion"], certificate["kind"]) == ("cert-manager.io/v1", "Certificate")
    release = render(*CASES["secure"], namespace=certificate["metadata"]["namespace"])
    texts = (*re.findall(r"`.+?`", KUBERNETES), release.notes, target(release))
    called = {name for each in texts for name in re.findall(r"([a-z][\w.-]+):50051", each)}
    assert called == set(certificate["spec"]["dnsNames"])


def test_secrets_that_are_made_as_the_page_says_let_a_server_start(releases, secrets, tmp_path):
    """The page's own commands: kubectl makes what it would send to a cluster."""
    kubectl = tools.unpacked("kubernetes-client") / "usr" / "bin"
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_bytes(secrets["selection-tls"][name])
    (tmp_path / "queryselect").write_text(f'#!/bin/sh\nexec {sys.executable} {shlex.join(ENTRYPOINT)} "$@"\n')
    (tmp_path / "queryselect").chmod(0o700)
    commands = [
        line
        for block in blocks("sh", KUBERNETES)
        for line in block.splitlines()
        if re.match("queryselect|kubectl.+create", line)
    ]
    assert len(commands) == 4
    made = {}
    for each in commands:
        dry = f"{each} --dry-run=client --output=yaml" if each.startswith("kubectl") else each
        printed = shell(dry, tmp_path, PATH=f"{tmp_path}:{kubectl}:{os.environ['PATH']}")
        if printed:
            document = yaml.safe_load(printed)
            kubernetes_validate.validate(document, kubernetes_validate.latest_version())
            made[document["metadata"]["name"]] = {k: base64.b64decode(v) for k, v in document["data"].items()}
    (values,) = (each for each in map(yaml.safe_load, blocks("yaml", KUBERNETES)) if "test" in each)
    release = render_with(values)
    node = Node(tmp_path / "node", release, made)
    assert set(made) == {"selection-tokens", "selection-tls", "selection-test"}
    with node.serve(release.pod) as serving:
        assert probe(release.container["readinessProbe"]["grpc"], serving) == SERVING
        tls = grpc.ssl_channel_credentials(secrets["selection-ca"]["ca.crt"])
        with Client(f"localhost:{serving.port}", tls=tls) as client, pytest.raises(Unauthenticated):
            client.server_info()
