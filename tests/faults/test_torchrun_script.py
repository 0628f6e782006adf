"""torchrun.sh: what it starts on one machine, on several and under SLURM; what it refuses; what it passes on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import tiny

pytestmark = pytest.mark.fault
SCRIPT = tiny.ROOT / "torchrun.sh"
VARIABLES = tuple(
    """
    NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT LOCAL_ADDR RDZV_ID MAX_RESTARTS OMP_NUM_THREADS DRY_RUN PYTHON
    PET_SIGNALS_TO_HANDLE TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_DISABLE_SHARE_RDZV_TCP_STORE
    """.split()
)
TWO_NODES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "NPROC": "1"}


def start(arguments: list[str], *, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """torchrun.sh with `environment`, and nothing of the caller's that it reads."""
    variables = {
        name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("SLURM_")
    }
    return subprocess.run(
        [str(SCRIPT), *arguments], cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=60
    )


def dry_run(arguments: list[str], **environment: str) -> list[str]:
    """The commands it would run, without the interpreter and the script's folder."""
    done = start(arguments, DRY_RUN="1", PYTHON="python", **environment)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("python ").replace(f"{tiny.ROOT}/", "") for line in done.stdout.splitlines()]


def flags(command: str) -> dict[str, str]:
    """torchrun's own flags."""
    return dict(word.split("=", 1) for word in command.split(" train.py")[0].split() if "=" in word)


@pytest.fixture
def fake_python(tmp_path) -> str:
    """An interpreter that says there are 3 GPUs, fails `--check` of bad.yaml, and prints how it was started."""
    path = tmp_path / "fake python"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in *device_count*) echo 3; exit ;; *bad.yaml*--check) echo "error: bad" >&2; exit 2 ;; esac\n'
        'echo "pid $$"; for word in "$@"; do echo "word $word"; done; env\n'
    )
    path.chmod(0o755)
    return str(path)


# ---- one machine ----


def test_one_machine_checks_then_starts_without_any_address():
    check, command = dry_run(["run.yaml", "--lr", "3e-5"], NPROC="2")
    assert check == "train.py run.yaml --lr 3e-5 --check"
    assert command == (
        "-m torch.distributed.run --rdzv-backend=c10d --rdzv-endpoint=FILE --rdzv-conf=store_type=file "
        "--nproc-per-node=2 --max-restarts=0 train.py run.yaml --lr 3e-5"
    )


def test_built_in_sample_needs_no_check():
    assert [command.split()[-1] for command in dry_run([], NPROC="1")] == ["train.py"]


@pytest.mark.parametrize("word", ["--check", "--help", "-h"])
def test_check_and_help_start_no_workers(word):
    assert dry_run(["run.yaml", word], NPROC="2") == [f"train.py run.yaml {word}"]


def test_restarts_and_gpus(fake_python):
    assert flags(dry_run(["run.yaml"], NPROC="1", MAX_RESTARTS="3")[1])["--max-restarts"] == "3"
    done = start(["run.yaml"], PYTHON=fake_python)
    assert "word --nproc-per-node=3\n" in done.stdout, done.stdout + done.stderr


def test_arguments_reach_the_training_unchanged(fake_python):
    words = ["my run.yaml", "--train_path", "data/*.csv", "", "it's"]
    out = start(words, NPROC="1", PYTHON=fake_python).stdout.split("pid ")[-1]
    started = [line.removeprefix("word ") for line in out.splitlines() if line.startswith("word ")]
    assert started[-len(words) :] == words


def test_environment_of_the_workers(fake_python):
    def environment(**given: str) -> dict[str, str]:
        out = start(["run.yaml"], PYTHON=fake_python, **given).stdout.split("pid ")[-1]
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line and not line.startswith("word "))

    plain = environment(NPROC="2")
    assert plain["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert (
        plain["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
        plain["OMP_NUM_THREADS"],
        plain["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"],
    ) == ("120", "1", "1")
    chosen = {"PET_SIGNALS_TO_HANDLE": "SIGTERM", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9", "OMP_NUM_THREADS": "4"}
    assert chosen.items() <= environment(NPROC="2", **chosen).items()
    assert "OMP_NUM_THREADS" not in environment(NPROC="1")
    assert environment(**TWO_NODES)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_torchrun_replaces_the_script_process(fake_python):
    """So that a signal to the script's process is one to torchrun."""
    process = subprocess.Popen(
        [str(SCRIPT)], env=os.environ | {"NPROC": "1", "PYTHON": fake_python}, stdout=subprocess.PIPE, text=True
    )
    assert f"pid {process.pid}\n" in process.communicate(timeout=60)[0]


def test_torchrun_knows_the_variables_that_are_set():
    """The installed one reads the two variables; an older one would pass them by."""
    code = (
        "import os; from torch.distributed.run import get_args_parser, config_from_args\n"
        "config, _, _ = config_from_args(get_args_parser().parse_args(['--nproc-per-node=1', 'train.py']))\n"
        "print(getattr(config, 'signals_to_handle', ''), getattr(config, 'shutdown_timeout', ''))"
    )
    done = tiny.run_command(["-c", code], PET_SIGNALS_TO_HANDLE="SIGTERM,SIGUSR1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="120")
    assert done.stdout.split() in ([], ["SIGTERM,SIGUSR1", "120"]), done.stdout + done.stderr


# ---- several machines ----


def test_first_machine_hosts_the_rendezvous():
    found = flags(dry_run(["run.yaml"], **TWO_NODES)[1])
    assert found == {
        "--nnodes": "2",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node0:29500",
        "--rdzv-id": "mmbert",
        "--rdzv-conf": "is_host=1,read_timeout=600",
        "--local-addr": "node0",
        "--nproc-per-node": "1",
        "--max-restarts": "0",
    }


def test_other_machines_join_it():
    for rank, name in (("1", "~00001"), ("15", "~00015")):
        found = flags(dry_run(["run.yaml"], **TWO_NODES | {"NNODES": "16", "NODE_RANK": rank})[1])
        assert (found["--rdzv-conf"], found["--rdzv-endpoint"], found["--local-addr"]) == (
            "is_host=0,read_timeout=600",
            "node0:29500",
            name,
        )


def test_names_sort_by_node_rank():
    """torchrun ranks machines by the order of their names; NODE_RANK=0 must get rank 0, with any address."""
    for first in ("zeus.example.org", "10.0.0.9", "UPPER"):
        names = [
            flags(
                dry_run(["run.yaml"], **TWO_NODES | {"NNODES": "11", "NODE_RANK": str(rank), "MASTER_ADDR": first})[1]
            )["--local-addr"]
            for rank in (0, 1, 2, 10)
        ]
        assert names == sorted(names) and names[0] == first


def test_port_address_and_name_of_the_job_can_be_given():
    given = {"MASTER_PORT": "29777", "LOCAL_ADDR": "10.0.0.1", "RDZV_ID": "night", "MAX_RESTARTS": "2"}
    found = flags(dry_run(["run.yaml"], **TWO_NODES | given)[1])
    assert (found["--rdzv-endpoint"], found["--local-addr"], found["--rdzv-id"], found["--max-restarts"]) == (
        "node0:29777",
        "10.0.0.1",
        "night",
        "2",
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: expected the name of the machine with NODE_RANK=0, found nothing"),
        ({"NODE_RANK": ""}, "NODE_RANK: expected which of the machines this is, from 0, found nothing"),
        ({"NODE_RANK": "first"}, "NODE_RANK: expected which of the machines this is, from 0, found first"),
        ({"NODE_RANK": "2"}, "NODE_RANK: expected a number below NNODES, found 2"),
    ],
)
def test_incomplete_settings_are_refused_in_one_line(fake_python, changes, problem):
    done = start(["run.yaml"], PYTHON=fake_python, **TWO_NODES | changes)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"torchrun.sh: {problem} (NNODES=2)\n")


@pytest.mark.parametrize("nodes", [{"NPROC": "2"}, TWO_NODES])
def test_bad_input_ends_with_2_before_any_worker(fake_python, nodes):
    done = start(["bad.yaml"], PYTHON=fake_python, **nodes)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: bad\n")


# ---- SLURM ----


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of the second task of a step on three machines; `scontrol` is on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-9]" ] && printf "n7\\nn8\\nn9\\n"\n')
    (folder / "scontrol").chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NPROC": "1",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "n[7-9]",
        "SLURM_JOB_ID": "4711",
    }


def test_slurm_step_sets_everything(slurm):
    found = flags(dry_run(["run.yaml"], **slurm)[1])
    assert (found["--nnodes"], found["--rdzv-endpoint"], found["--rdzv-id"]) == ("3", "n7:29500", "4711")
    assert (found["--rdzv-conf"], found["--local-addr"]) == ("is_host=0,read_timeout=600", "~00001")
    first = flags(dry_run(["run.yaml"], **slurm | {"SLURM_NODEID": "0"})[1])
    assert (first["--rdzv-conf"], first["--local-addr"]) == ("is_host=1,read_timeout=600", "n7")


def test_own_settings_override_slurm(slurm):
    found = flags(dry_run(["run.yaml"], **slurm, NNODES="2", NODE_RANK="0", MASTER_ADDR="head", RDZV_ID="mine")[1])
    assert (found["--nnodes"], found["--rdzv-endpoint"], found["--rdzv-id"], found["--rdzv-conf"]) == (
        "2",
        "head:29500",
        "mine",
        "is_host=1,read_timeout=600",
    )


def test_batch_script_outside_srun_is_one_machine(slurm):
    """It runs on the first node alone, whatever the size of its job."""
    outside = {name: value for name, value in slurm.items() if "STEP" not in name} | {
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "n[7-9]",
    }
    assert flags(dry_run(["run.yaml"], **outside)[1])["--rdzv-conf"] == "store_type=file"


# ---- the script itself ----


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_shells_read_it(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(SCRIPT)], check=True)


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_head_comment_names_every_variable_that_is_read():
    text = SCRIPT.read_text(encoding="utf-8")
    head, body = text.split("set -eu", 1)
    used = {name for name in VARIABLES if f"{name}:-" in body}
    assert used and {name for name in used if name not in head} <= {"OMP_NUM_THREADS"}
