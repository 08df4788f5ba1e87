"""`ray up` files: Ray accepts them, they agree with each other, and what they start is what they say."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.environment import SETTINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CLOUDS = ["cluster.yaml", "deploy/gcp.yaml", "deploy/azure.yaml"]
FILES = [*CLOUDS, "deploy/local.yaml"]
JOBS_MAY_SAVE = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
KEPT = {name: value for name, value in SETTINGS.items() if name != "RAY_BACKEND_LOG_LEVEL"}
"""A node keeps its log: what the raylet says is how one finds out why a machine did not join."""
NODE_SETTINGS = {"RAY_AUTH_MODE": "token", **JOBS_MAY_SAVE, **KEPT}


def load(file):
    return yaml.safe_load((ROOT / file).read_text())


def validated(config):
    """As `ray up` does it: defaults of the provider filled in, then Ray's schema and rules."""
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def started(command, home, *, addresses="192.0.2.99"):
    """What a start command makes of `ray`: its arguments, and the environment that Ray and its workers get."""
    tools = home / "tutelage-env" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "ray").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$HOME/arguments"\nenv -0 > "$HOME/environment"\n')
    (tools / "hostname").write_text(f'#!/bin/sh\necho "{addresses} "\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    shutil.copytree(ROOT / "deploy", home / "tutelage" / "deploy", dirs_exist_ok=True)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "192.0.2.10"}
    subprocess.run(["bash", "-c", f"export OMP_NUM_THREADS=1 && ({command})"], env=environment, check=True, timeout=20)
    arguments = (home / "arguments").read_text().split("\0")[:-1]
    pairs = (home / "environment").read_text().split("\0")[:-1]
    return arguments, dict(pair.split("=", 1) for pair in pairs)


def options(arguments):
    return {name: value for name, _, value in (word.partition("=") for word in arguments if word.startswith("--"))}


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_the_file(file):
    config = validated(load(file))
    assert config["cluster_name"] == "tutelage"


@pytest.mark.parametrize("file", CLOUDS)
def test_students_and_teachers_have_nodes_of_their_own_and_nothing_that_asks_for_a_cpu_runs_on_the_head(file):
    config = validated(load(file))
    types = config["available_node_types"]
    assert set(types) == {"head", "student", "teacher"}
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    for role, other in (("student", "teacher"), ("teacher", "student")):
        resources = types[role]["resources"]
        assert resources[f"{role}_node"] == 1
        assert f"{other}_node" not in resources
        assert resources["CPU"] >= 1
        assert resources["GPU"] >= 1
    assert {role: kind["labels"] for role, kind in types.items()} == {role: {"role": role} for role in types}
    assert types["student"]["min_workers"] >= 1


@pytest.mark.parametrize("file", CLOUDS)
def test_the_teacher_group_grows_and_the_cluster_has_room_for_both_groups_at_their_largest(file):
    config = validated(load(file))
    student, teacher = (config["available_node_types"][role] for role in ("student", "teacher"))
    assert 1 <= teacher["min_workers"] < teacher["max_workers"]
    assert config["max_workers"] == student["max_workers"] + teacher["max_workers"]


def test_only_teachers_are_spot_machines():
    spot = {"cluster.yaml": "MarketType", "deploy/gcp.yaml": "preemptible", "deploy/azure.yaml": "Spot"}
    for file, word in spot.items():
        types = load(file)["available_node_types"]
        assert [role for role, kind in types.items() if word in json.dumps(kind["node_config"])] == ["teacher"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"max_worker": 3}, "max_worker"),
        ({"rsync_exclude": "data"}, "is not of type 'array'"),
        ({"idle_timeout_minutes": "soon"}, "not of type 'number'"),
        ({"auth": {"ssh_usr": "ubuntu"}}, "ssh_usr"),
    ],
)
def test_ray_refuses_a_file_with_a_mistake(file, mistake, message):
    with pytest.raises(ValidationError, match=message):
        validated({**load(file), **mistake})


@pytest.mark.parametrize("file", CLOUDS)
@pytest.mark.parametrize(
    ("role", "mistake", "error", "message"),
    [
        ("teacher", {"resources": {"CPU": 0.5}}, ValidationError, "not of type 'integer'"),
        ("teacher", {"resource": {}}, ValidationError, "resource"),
        ("teacher", {"labels": {"role": 1}}, ValidationError, "not of type 'string'"),
        ("student", {"min_workers": 20, "max_workers": 20}, ValueError, "max_workers"),
    ],
)
def test_ray_refuses_a_node_type_with_a_mistake(file, role, mistake, error, message):
    config = load(file)
    config["available_node_types"][role].update(mistake)
    with pytest.raises(error, match=message):
        validated(config)


@pytest.mark.parametrize("file", CLOUDS)
def test_ray_refuses_a_head_that_is_no_node_type(file):
    with pytest.raises(ValueError, match="head_node_type"):
        validated({**load(file), "head_node_type": "boss"})


def test_ray_refuses_node_types_for_machines_of_ones_own():
    with pytest.raises(click.ClickException, match="available_node_types is not supported"):
        prepare_config(
            {**load("deploy/local.yaml"), "available_node_types": load("cluster.yaml")["available_node_types"]}
        )


@pytest.mark.parametrize("file", CLOUDS[1:])
def test_a_variant_differs_from_the_first_file_only_where_clouds_differ(file):
    first, variant = load("cluster.yaml"), load(file)
    assert set(first) == set(variant)
    cloud = {"provider", "auth", "available_node_types", "initialization_commands", "head_setup_commands"}
    assert {name: variant[name] for name in set(first) - cloud} == {name: first[name] for name in set(first) - cloud}
    for role, kind in first["available_node_types"].items():
        other = variant["available_node_types"][role]
        assert set(kind) == set(other)
        assert [kind["resources"].keys(), kind["labels"]] == [other["resources"].keys(), other["labels"]]


def test_machines_of_ones_own_get_the_same_files_and_the_same_environment():
    first, own = load("cluster.yaml"), load("deploy/local.yaml")
    for name in ("file_mounts", "setup_commands", "rsync_exclude"):
        assert own[name] == first[name]


@pytest.mark.parametrize("file", FILES)
def test_every_node_gets_the_token_and_all_that_pip_needs_and_no_data(file):
    mounts = load(file)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert mounts == {f"~/tutelage/{name}": name for name in mounts.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    modules = {f"{module}.py" for module in project["tool"]["setuptools"]["py-modules"]}
    needed = {"pyproject.toml", "constraints.txt", "deploy", project["project"]["readme"]} | packages | modules
    assert set(mounts.values()) == needed
    assert all((ROOT / name).exists() for name in needed)


@pytest.mark.parametrize("file", FILES)
def test_the_environment_is_the_one_that_the_tests_passed_with(file):
    setup = "\n".join(validated(load(file))["head_setup_commands"])  # Ray puts the common ones first
    assert "pip install --quiet -c constraints.txt -e ." in setup
    tested = (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert "--python 3.11 " in setup
    assert "Python 3.11" in tested


def test_nodes_export_the_settings_of_the_environment_and_ask_for_the_token(tmp_path):
    script = 'set -a; . "$1"; set +a; env -0'
    result = subprocess.run(
        ["env", "-i", "bash", "-c", script, "bash", str(ROOT / "deploy/node.env")],
        capture_output=True,
        text=True,
        check=True,
    )
    exported = dict(pair.split("=", 1) for pair in result.stdout.split("\0")[:-1])
    for name in ("PWD", "SHLVL", "_"):
        exported.pop(name, None)
    assert exported == NODE_SETTINGS


def test_a_shell_on_a_node_has_the_settings_however_often_it_was_set_up(tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "tutelage" / "deploy")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    (for_shells,) = (command for command in load("cluster.yaml")["setup_commands"] if ".bashrc" in command)
    for _ in range(2):
        subprocess.run(["bash", "-c", for_shells], env=environment, check=True)
    assert (tmp_path / ".bashrc").read_text().count("\n") == 1
    shown = subprocess.run(
        ["bash", "-c", 'source ~/.bashrc; echo "$RAY_AUTH_MODE ${PATH%%:*}"; env -0 | tr "\\0" "\\n" | grep ^RAY_AUTH'],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == [f"token {tmp_path}/tutelage-env/bin", "RAY_AUTH_MODE=token"]


@pytest.mark.parametrize("file", FILES)
def test_the_head_starts_with_the_settings_a_private_dashboard_and_a_fixed_port_for_metrics(file, tmp_path):
    config = validated(load(file))
    arguments, environment = started(config["head_start_ray_commands"][-1], tmp_path)
    chosen = options(arguments)
    assert arguments[0] == "start"
    assert "--head" in chosen
    assert chosen["--dashboard-host"] == "127.0.0.1"
    assert chosen["--metrics-export-port"] == "8080"
    assert chosen["--port"] == "6379"
    assert chosen["--autoscaling-config"].endswith("/ray_bootstrap_config.yaml")
    assert NODE_SETTINGS.items() <= environment.items()
    assert "OMP_NUM_THREADS" not in environment
    assert environment["PATH"].startswith(f"{tmp_path}/tutelage-env/bin:")


@pytest.mark.parametrize("file", FILES)
def test_a_worker_joins_the_head_with_the_settings_and_a_fixed_port_for_metrics(file, tmp_path):
    config = validated(load(file))
    arguments, environment = started(config["worker_start_ray_commands"][-1], tmp_path)
    chosen = options(arguments)
    assert arguments[0] == "start"
    assert "--head" not in chosen
    assert chosen["--address"] == "192.0.2.10:6379"
    assert chosen["--metrics-export-port"] == "8080"
    assert NODE_SETTINGS.items() <= environment.items()
    assert "OMP_NUM_THREADS" not in environment


@pytest.mark.parametrize(
    ("addresses", "role"),
    [
        ("192.0.2.11", "student"),
        ("172.17.0.1 192.0.2.11", "student"),
        ("192.0.2.21", "teacher"),
        ("192.0.2.111", "teacher"),
        ("192.0.2.1", "teacher"),
    ],
)
def test_a_machine_of_ones_own_is_what_its_address_says(addresses, role, tmp_path):
    command = load("deploy/local.yaml")["worker_start_ray_commands"][-1]
    chosen = options(started(command, tmp_path, addresses=addresses)[0])
    assert json.loads(chosen["--resources"]) == {f"{role}_node": 1}
    assert chosen["--labels"] == f"role={role}"


def test_the_head_of_ones_own_has_no_cpu_for_ray_and_says_that_it_is_the_head(tmp_path):
    command = load("deploy/local.yaml")["head_start_ray_commands"][-1]
    chosen = options(started(command, tmp_path)[0])
    assert (chosen["--num-cpus"], chosen["--labels"]) == ("0", "role=head")


@pytest.mark.parametrize("file", FILES)
def test_a_start_command_uses_only_options_that_ray_has(file, tmp_path):
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    config = load(file)
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        used = set(options(started(config[kind][-1], tmp_path)[0]))
        assert used <= known
