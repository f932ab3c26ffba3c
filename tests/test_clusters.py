"""The cluster files of the documents: what Ray and Kubernetes would refuse, and what we promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "docs" / "clusters"
LAUNCHED = ("cluster.yaml", "on-premises.yaml")
FILES = (*LAUNCHED, "kuberay.yaml")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# What listens on every address.
EVERYWHERE = ".".join("0000")


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(name)))


def commands(name: str, which: str) -> str:
    (config,) = documents(name)
    return "\n".join(config[f"{which}_start_ray_commands"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(name)
    prepared = prepare_config(config)
    validate_config(prepared)
    # Ray's own commands install a nightly build and open the dashboard: none of them is left.
    assert "3.0.0.dev0" not in str(prepared)
    assert EVERYWHERE not in str(prepared)
    for which in ("head", "worker"):
        assert prepared[f"{which}_start_ray_commands"] == config[f"{which}_start_ray_commands"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_mistyped_key_would_be_noticed(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents(name)
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config({**config, "idle_timeout_minuts": 1}))


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("which", ["head", "worker"])
def test_every_node_starts_with_a_token_and_our_environment(name: str, which: str) -> None:
    (config,) = documents(name)
    started = [line for line in commands(name, which).split("\n") if "ray start" in line]
    (line,) = started
    before = line.partition("ray start")[0]
    assert "RAY_AUTH_MODE=token" in before
    assert "RAY_USAGE_STATS_ENABLED=0" in before
    # A job's `grid` is the one on the raylet's PATH.
    assert 'PATH="$HOME/grid-env/bin:$PATH"' in before
    # Without the file the head refuses to start, and validation does not see it.
    secret = "~/.ray/auth_token"  # noqa: S105
    assert config["file_mounts"][secret] == secret
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    if which == "head":
        assert "--dashboard-host=127.0.0.1" in line
        assert "--disable-usage-stats" in line


@pytest.mark.parametrize("name", FILES)
def test_nothing_listens_for_the_world(name: str) -> None:
    assert not re.search(r"\b0\.0\.0\.0\b|::/0", text(name))


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_that_were_tested(name: str) -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().split())
    found = re.findall(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([0-9][0-9.]*)", text(name))
    found += [("ray", version) for version in re.findall(r"rayVersion: (\S+)", text(name))]
    assert [(p, version) for p, version in found if pins[p] != version] == []
    assert "ray" in dict(found)
    if name in LAUNCHED:
        install = next(c for c in documents(name)[0]["setup_commands"] if "pip install" in c)
        assert "-c ~/backdoor-grid/constraints.txt" in install


@pytest.mark.parametrize(
    ("name", "num"), [("cluster.yaml", 5), ("on-premises.yaml", 4), ("kuberay.yaml", 3)]
)
def test_what_must_be_yours_is_marked_once(name: str, num: int) -> None:
    """A placeholder is on a marked line or on the first line after its mark, and nowhere else."""
    lines = text(name).splitlines()
    marked = [i for i, line in enumerate(lines) if "# PLACEHOLDER" in line]
    assert len(marked) == num
    made_up = re.compile(
        r"\b(ami|subnet|sg|fs)-0{17}|192\.0\.2\.\d+|example\.com|us-east-1$|shared-files|id_ed25519"
    )
    for number, line in enumerate(lines):
        if made_up.search(line.partition(" #")[0]):
            near = {number, number - 1, number - 2}
            assert near & set(marked), f"{name}:{number + 1} is not marked: {line}"


def test_on_aws_spot_comes_first_and_no_group_is_left_to_ray() -> None:
    (config,) = documents("cluster.yaml")
    types = config["available_node_types"]
    head, spot, fallback = types["head"], types["gpu-spot"], types["gpu-on-demand"]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["priority"] > fallback["priority"]
    assert spot["resources"] == fallback["resources"]
    assert [t["labels"]["market"] for t in (spot, fallback)] == ["spot", "on-demand"]
    # A group that Ray makes takes ssh from anywhere.
    assert all(t["node_config"]["SecurityGroupIds"] for t in types.values())
    assert "security_group" not in config["provider"]
    assert config["provider"]["cache_stopped_nodes"] is False
    assert any("/mnt/grid" in c and "nfs4" in c for c in config["initialization_commands"])


def test_on_premises_the_head_runs_no_stages() -> None:
    assert "--num-cpus=0" in commands("on-premises.yaml", "head")
    (config,) = documents("on-premises.yaml")
    assert "available_node_types" not in config
    assert "min_workers" not in config


# The fields of the Kubernetes file that we use, and what they hold; none besides.

POD: dict[str, Any] = {
    "spec": {
        "containers": [
            {
                "name": str,
                "image": str,
                "env": [{"name": str, "value": str}],
                "resources": {"requests": {str: str}, "limits": {str: str}},
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [
            {
                "name": str,
                "persistentVolumeClaim?": {"claimName": str},
                "emptyDir?": {"medium": str, "sizeLimit": str},
            }
        ],
    }
}
CLAIM: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "accessModes": [str],
        "storageClassName": str,
        "resources": {"requests": {str: str}},
    },
}
JOB: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int},
            "headGroupSpec": {"rayStartParams": {str: str}, "template": POD},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": {str: str},
                    "template": POD,
                }
            ],
        },
    },
}


def misfits(value: Any, schema: Any, where: str = "") -> list[str]:
    """Where a value is not as a schema says: a type, a list of one schema, or named fields."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: no list"]
        return [
            m for i, item in enumerate(value) for m in misfits(item, schema[0], f"{where}[{i}]")
        ]
    if not isinstance(value, Mapping):
        return [f"{where}: no mapping"]
    if str in schema:
        return [m for k, v in value.items() for m in misfits(v, schema[str], f"{where}.{k}")]
    named = {key.removesuffix("?"): part for key, part in schema.items()}
    found = [f"{where}.{key}: not known" for key in value.keys() - named.keys()]
    found += [f"{where}.{key}: missing" for key in schema.keys() - value.keys() if key[-1] != "?"]
    return found + [
        m for k, v in value.items() if k in named for m in misfits(v, named[k], f"{where}.{k}")
    ]


def test_the_kubernetes_file_has_the_fields_that_are_known() -> None:
    claim, job = documents("kuberay.yaml")
    assert misfits(claim, CLAIM) == []
    assert misfits(job, JOB) == []
    # The check notices a field that is not one, a missing one, and a wrong type.
    spec = {**job["spec"], "backofLimit": 1, "backoffLimit": "3"}
    del spec["entrypoint"]
    assert len(misfits({**job, "spec": spec}, JOB)) == 3


def test_on_kubernetes_the_head_runs_no_stages_and_all_share_a_volume() -> None:
    claim, job = documents("kuberay.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] > 0
    assert " --preflight " in job["spec"]["entrypoint"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert (
            mounts["/mnt/grid"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        )
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"  # noqa: S108
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    (worker,) = cluster["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
