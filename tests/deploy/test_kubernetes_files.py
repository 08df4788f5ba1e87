"""KubeRay manifests: every field is one that KubeRay has, they agree with each other and with `cluster.yaml`."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start

from pipelines.environment import SETTINGS

ROOT = Path(__file__).parents[2]
MANIFESTS = ["deploy/kubernetes.yaml", "deploy/raycluster.yaml", "deploy/rayjob.yaml"]
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())


def objects(file):
    return list(yaml.safe_load_all((ROOT / file).read_text()))


def validate(manifest):
    jsonschema.validate(manifest, {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMA["$defs"]})


def cluster_spec():
    return objects("deploy/raycluster.yaml")[0]["spec"]


def groups(spec):
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("file", MANIFESTS)
def test_every_field_is_one_that_kubernetes_and_kuberay_have(file):
    for manifest in objects(file):
        validate(manifest)


def test_the_schema_itself_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def _put(path, value):
    def change(manifest):
        *way, last = path
        for step in way:
            manifest = manifest[step]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_put(["spec", "headGroupSpecs"], {}), "headGroupSpecs"),
        (_put(["spec", "authOptions", "mode"], "tokens"), "tokens"),
        (_put(["spec", "headGroupSpec", "resources", "CPU"], 0), "not of type 'string'"),
        (_put(["spec", "workerGroupSpecs", 0, "maxReplicas"], "1"), "not of type 'integer'"),
        (
            _put(
                ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"],
                "8GiB",
            ),
            "8GiB",
        ),
        (_put(["spec", "workerGroupSpecs", 0, "template", "spec", "containers"], []), "non-empty"),
        (lambda manifest: manifest["spec"]["workerGroupSpecs"][1].pop("groupName"), "groupName"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(mistake, message):
    manifest = copy.deepcopy(objects("deploy/raycluster.yaml")[0])
    mistake(manifest)
    with pytest.raises(jsonschema.ValidationError, match=message):
        validate(manifest)


def test_students_and_teachers_have_pods_of_their_own_and_nothing_that_asks_for_a_cpu_runs_on_the_head():
    spec = cluster_spec()
    assert spec["headGroupSpec"]["resources"] == {"CPU": "0"}
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["student", "teacher"]
    for group in spec["workerGroupSpecs"]:
        role = group["groupName"]
        assert (group["resources"], group["labels"]) == ({f"{role}_node": "1"}, {"role": role})
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
    assert spec["headGroupSpec"]["labels"] == {"role": "head"}


def test_the_group_sizes_are_those_of_the_other_clusters():
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    for group in cluster_spec()["workerGroupSpecs"]:
        kind = types[group["groupName"]]
        assert (group["minReplicas"], group["maxReplicas"]) == (kind["min_workers"], kind["max_workers"])
        assert group["replicas"] == group["minReplicas"]


def test_ray_asks_for_a_token_and_its_own_autoscaler_adds_the_pods():
    spec = cluster_spec()
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert {group["template"]["spec"]["restartPolicy"] for group in groups(spec)} == {"Never"}  # as autoscaler v2 needs
    assert spec["rayVersion"] == ray.__version__


def test_the_dashboard_of_a_cluster_listens_on_its_own_pod_only_and_metrics_have_a_fixed_port():
    spec = cluster_spec()
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    known = {name for parameter in start.params for name in parameter.opts}
    for group in groups(spec):
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_every_pod_has_the_settings_of_the_environment_a_large_enough_shm_and_the_shared_folder():
    config, _, claim, policy = objects("deploy/kubernetes.yaml")
    kept = {name: value for name, value in SETTINGS.items() if name != "RAY_BACKEND_LOG_LEVEL"}
    assert config["data"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", **kept}
    for group in groups(cluster_spec()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounted["/mnt/tutelage"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
        shm = int(mounted["/dev/shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        assert shm < 0.4 * memory  # what lies there counts towards the container's memory
        labels = group["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_head_pod_says_how_far_the_groups_may_grow():
    said = objects("deploy/kubernetes.yaml")[1]
    spec = cluster_spec()
    head = spec["headGroupSpec"]["template"]["spec"]
    volume = next(volume for volume in head["volumes"] if "configMap" in volume)
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == volume["name"])
    assert volume["configMap"]["name"] == said["metadata"]["name"]
    assert mount["mountPath"] == f"/home/ray/{mount['subPath']}"
    config = yaml.safe_load(said["data"][mount["subPath"]])
    types = config["available_node_types"]
    assert types.pop(config["head_node_type"]) == {"resources": {"CPU": 0}}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in types.values())
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        own = {name: int(amount) for name, amount in group["resources"].items()}
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"]), **own}
        assert types[group["groupName"]] == {"max_workers": group["maxReplicas"], "resources": resources}


def test_metrics_are_all_that_another_namespace_may_read():
    policy = objects("deploy/kubernetes.yaml")[-1]["spec"]
    outside = [rule for rule in policy["ingress"] if any("namespaceSelector" in peer for peer in rule["from"])]
    named = [rule for rule in outside if any("podSelector" not in peer for peer in rule["from"])]
    assert [rule["ports"] for rule in named] == [[{"protocol": "TCP", "port": 8080}]]


def test_a_job_brings_the_cluster_of_the_other_manifest_with_a_dashboard_that_kuberay_reaches():
    spec = copy.deepcopy(objects("deploy/rayjob.yaml")[0]["spec"]["rayClusterSpec"])
    start_params = spec["headGroupSpec"]["rayStartParams"]
    assert start_params["dashboard-host"] == "0.0.0.0"
    start_params["dashboard-host"] = "127.0.0.1"
    assert spec == cluster_spec()


def test_the_image_is_built_from_the_constraints_and_has_all_that_pip_needs():
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert text.count("-c constraints.txt") == 2
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    mounts = yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"].values()
    assert copied == {name for name in mounts if not name.startswith("~")}
