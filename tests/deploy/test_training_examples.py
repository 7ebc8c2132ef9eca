"""The examples for clusters start a command that exists, with options that it has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from training.ending import STOPPED_STATUS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "training"
TORCHRUN = {"nnodes", "nproc-per-node", "max-restarts", "rdzv-backend", "rdzv-endpoint", "rdzv-id"}


def check_command(words):
    """torchrun's own options, then `-m training` with options of its command line and a recipe that exists."""
    at = words.index("-m")
    assert words[0] == "torchrun"
    assert words[at + 1] == "training"
    own = {re.match(r"--([a-z-]+)", word).group(1) for word in words[1:at]}
    assert {"nnodes", "nproc-per-node", "rdzv-endpoint"} <= own <= TORCHRUN
    source = (ROOT / "training" / "__main__.py").read_text()
    given = dict(re.match(r"--([a-z]+)=?(.*)", word).groups() for word in words[at + 2 :] if word.startswith("--"))
    assert {"data", "out", "recipe"} == set(given)
    assert all(f'"--{name}"' in source for name in given)
    return given


def test_the_kubernetes_job_trains_in_a_shared_folder():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    shell, script = container["command"][:2], container["command"][2]
    assert shell == ["bash", "-c"]
    words = re.search(r"torchrun .*(?= &$)", script.replace("\\\n", " "), re.M).group().split()
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    options = iter(word.strip('"') for word in words[words.index("-m") + 2 :])
    given = {option: variables[value.removeprefix("$")] for option, value in zip(options, options, strict=True)}
    assert set(given) == {"--data", "--out", "--recipe"}
    check_command(words)
    assert (ROOT / "training" / "recipes" / f"{given['--recipe']}.toml").exists()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert given["--out"].startswith(mounts["runs"] + "/")
    assert given["--data"].startswith(mounts["photos"])
    assert job["spec"]["completionMode"] == "Indexed"
    assert f"--nnodes={job['spec']['completions']}" in words
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in words
    [endpoint] = [word for word in words if word.startswith("--rdzv-endpoint=")]
    assert f"{job['metadata']['name']}-0.{pod['subdomain']}:" in endpoint
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash to run the script")
@pytest.mark.parametrize(
    ("torchrun", "status"),
    [("exit 0", 0), ("exit 1", 1), ('touch "$OUT/stopped.json"; exit 1', STOPPED_STATUS)],
    ids=["done", "error", "stopped by a check"],
)
def test_the_kubernetes_job_is_not_repeated_after_the_stop_of_a_check(tmp_path, torchrun, status):
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    (tmp_path / "torchrun").chmod(0o755)
    variables = {"DATA": "d", "OUT": str(tmp_path), "RECIPE": "r", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(pod["containers"][0]["command"], env=variables, check=False, timeout=30)
    assert done.returncode == status
    [fails, _] = job["spec"]["podFailurePolicy"]["rules"]
    assert (fails["action"], fails["onExitCodes"]["values"]) == ("FailJob", [STOPPED_STATUS])
    assert fails["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy is allowed with no other


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash to read the script")
def test_the_slurm_script_trains_and_queues_itself_again():
    path = EXAMPLES / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    command = re.search(r"srun (torchrun .*?) &$", text.replace("\\\n", " "), re.M).group(1)
    words = [word for word in command.split() if word not in ('"$@"',) and not word.startswith('"$')]
    assert set(check_command(words)) == {"data", "out", "recipe"}
    recipe = re.search(r"RECIPE:-(\w+)", text).group(1)
    assert (ROOT / "training" / "recipes" / f"{recipe}.toml").exists()
    assert "#SBATCH --signal=B:TERM@" in text


def run_script(tmp_path, srun):
    """The script with stand-ins for SLURM's commands; what was queued again, and the exit status."""
    for name, body in {"srun": srun, "scontrol": 'echo "$@" >> "$LOG"; echo host0'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"DATA": "d", "OUT": str(tmp_path), "LOG": str(tmp_path / "log"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    variables |= {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(EXAMPLES / "slurm.sh")], env=variables, check=False, timeout=30)
    return (tmp_path / "log").read_text().splitlines(), done.returncode


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash to run the script")
@pytest.mark.parametrize(
    ("srun", "requeued", "status"),
    [
        ('kill -TERM "$PPID"; sleep 0.5; exit 143', True, None),  # SLURM's signal comes to the script
        ("exit 2", False, 2),
        ("exit 0", False, 0),
        ('touch "$OUT/stopped.json"; exit 1', False, STOPPED_STATUS),
    ],
    ids=["time is up", "error", "done", "stopped by a check"],
)
def test_only_a_job_whose_time_is_up_is_queued_again(tmp_path, srun, requeued, status):
    said, found = run_script(tmp_path, srun)
    assert ("requeue 7" in said) == requeued
    assert status is None or found == status
