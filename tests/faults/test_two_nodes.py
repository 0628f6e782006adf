"""Two machines without a shared folder: two connected network namespaces, torchrun.sh in each. Real gloo processes.

Every machine has its own working folder with its own copies of data and encoder; the paths of the config are relative.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmbert_core.storage.files import sha256_of
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row

pytestmark = pytest.mark.fault
ADDRESSES = ("10.231.7.9", "10.231.7.10")  # the second sorts first: ranks must follow NODE_RANK, not addresses
INTERFACE = "cable"
RUN_SECONDS = 240.0


# ---- two machines ----


class Machine:
    """A network namespace, which exists as long as its holder process, and a working folder."""

    def __init__(self, folder: Path, parent: "Machine | None") -> None:
        self.folder = folder
        self.as_user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        new = ["unshare", "--net"] if parent or not os.geteuid() else ["unshare", "--user", "--map-root-user", "--net"]
        inside = ["nsenter", "-t", str(parent.holder.pid), *self.as_user] if parent and self.as_user else []
        # `cat` ends with the test's process, because its stdin is then closed
        self.holder = subprocess.Popen(
            [*inside, *new, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 5
        while self.network() in (None, os.readlink("/proc/self/ns/net")):
            if self.holder.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise OSError(f"no network namespace: {self.holder.stderr.read().strip()}")
            time.sleep(0.01)

    def network(self, pid: int | None = None) -> str | None:
        """The network namespace of the holder or of another process; None if that has ended or is another user's."""
        try:
            return os.readlink(f"/proc/{pid or self.holder.pid}/ns/net")
        except OSError:
            return None

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), *self.as_user, "--net", *words]

    def ip(self, *words: str) -> None:
        done = subprocess.run(self.command("ip", *words), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def pids(self) -> list[int]:
        """Processes in this machine's network namespace."""
        here = self.network()
        everything = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in everything if here and pid != self.holder.pid and self.network(pid) == here]

    def workers(self) -> list[int]:
        return [pid for pid in self.pids() if b"\0LOCAL_RANK=" in read_bytes(Path(f"/proc/{pid}/environ"))]

    def power_off(self) -> None:
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)

    def close(self) -> None:
        self.power_off()
        self.holder.kill()
        self.holder.wait()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two connected machines; their processes are killed at the end. Skips the test if namespaces are not allowed."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: no network namespaces")
    machines: list[Machine] = []
    try:
        try:
            machines.append(Machine(folder / "node0", None))
            machines.append(Machine(folder / "node1", machines[0]))
            pair = f"link add {INTERFACE} type veth peer name {INTERFACE} netns {machines[1].holder.pid}"
            machines[0].ip(*pair.split())
            for machine, address in zip(machines, ADDRESSES):
                machine.ip("addr", "add", f"{address}/24", "dev", INTERFACE)
                machine.ip("link", "set", INTERFACE, "up")
                machine.ip("link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
        yield machines[0], machines[1]
    finally:
        for machine in reversed(machines):
            machine.close()


# ---- a run on them ----


def write_node(folder: Path, **changes: object) -> None:
    """Data, encoder and config of one machine; the same bytes each time, every path relative."""
    values = tiny.settings(folder, val_check_interval=1.0) | {
        "train_path": "train.csv",
        "val_path": "val.csv",
        "test_path": "test.csv",
        "encoder": "encoder",
        "model_path": "run",
        "cache_path": "cache",
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(values))


class Job:
    """A command started on some machines at once. Output goes to files: a full pipe would block a process."""

    def __init__(self, folder: Path, starts: list[tuple[Path, Callable[..., list[str]], dict[str, str]]]) -> None:
        """`starts`: for each machine its working folder, a function of torchrun.sh's path to the command, variables."""
        self.outputs = [folder / f"output-{time.monotonic_ns()}-{index}.txt" for index in range(len(starts))]
        common = {"PYTHON": sys.executable, "PYTHONPATH": str(tiny.ROOT)}
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GLOO_", "PET_"))
        } | common
        self.processes = []
        for output, (cwd, command, environment) in zip(self.outputs, starts):
            with open(output, "w") as stream:
                words = command(str(tiny.ROOT / "torchrun.sh"), "run.json")
                self.processes.append(
                    subprocess.Popen(
                        words,
                        cwd=cwd,
                        env=variables | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float = RUN_SECONDS) -> list[int | None]:
        """Exit codes; None for a process that did not end in time."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [process.poll() for process in self.processes]

    def text(self) -> str:
        """The last lines of every machine's output, for the message of a failed test."""
        return "".join(
            f"\n--- machine {index} ---\n{output.read_text(errors='replace')[-3000:]}"
            for index, output in enumerate(self.outputs)
        )


def start_on(
    machines: tuple[Machine, Machine], folder: Path, *, processes: int = 1, first: int = 0, **environment: str
) -> Job:
    """As torchrun.sh's header describes; machine `first` has NODE_RANK=0.

    The host name resolves to 127.0.0.1 in both namespaces, so gloo needs the interface's name.
    """
    common = {
        "NNODES": "2",
        "NPROC": str(processes),
        "MASTER_ADDR": ADDRESSES[first],
        "GLOO_SOCKET_IFNAME": INTERFACE,
        **environment,
    }
    starts = [
        (machine.folder, machine.command, {**common, "NODE_RANK": str(index ^ first)})
        for index, machine in enumerate(machines)
    ]
    return Job(folder, starts)


def on_one_machine(folder: Path, *, processes: int, **changes: object) -> tuple[Path, list[int | None], str]:
    """The reference run with as many processes on one machine: its folder, exit code and output."""
    write_node(folder, **changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher += [str(tiny.ROOT / "train.py"), "run.json"]
    job = Job(folder, [(folder, lambda *words: launcher, {"OMP_NUM_THREADS": "1"})])
    codes = job.wait()
    for process in job.processes:
        process.kill()
    return folder / "run", codes, job.text()


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train_loss"]) for line in tiny.metrics_lines(run) if "train_loss" in line]


def compare(figures: Figures, run: Path, expected: Path, case: str, *, after: int = 0) -> None:
    """Count whether losses, weights and predictions of two runs are bit-equal.

    `after` a step: only the losses after it and the last checkpoint; the steps before are on the other machine.
    """
    found, wanted = losses(run), [line for line in losses(expected) if line[0] > after]
    figures.count(
        [step for step, _ in found] == [step for step, _ in wanted], f"{case}: steps {[step for step, _ in found]}"
    )
    worst = max((abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, wanted)), default=1.0)
    figures.notes.append(f"{case}: largest relative difference of {len(wanted)} losses {worst:.1e}")
    figures.count(worst == 0.0, f"{case}: losses differ by {worst:.1e}")
    last = f"checkpoints/step-{wanted[-1][0]:08d}"
    for name in (
        f"{last}/model.safetensors",
        f"{last}/optimizer.safetensors",
        *([] if after else ["model.safetensors"]),
    ):
        figures.count(sha256_of(run / name) == sha256_of(expected / name), f"{case}: {name} differs")
    if after:  # the best step so far may be on the other machine
        return
    [produced], [right] = (list(folder.glob("multimodal_bert-*/test_result_0.tsv")) for folder in (run, expected))
    figures.count(produced.read_bytes() == right.read_bytes(), f"{case}: predictions differ")


def newest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)


def reached(run: Path, step: int, job: Job) -> bool:
    """Wait for the checkpoint of a step; False when the job ended or hung before it."""
    deadline = time.monotonic() + RUN_SECONDS
    while newest_step(run) < step:
        if time.monotonic() > deadline or any(process.poll() is not None for process in job.processes):
            return False
        time.sleep(0.01)
    return True


# ---- the rows ----


@row(
    "E1",
    "two machines without a shared folder",
    "the same losses, weights and predictions as one machine, bit for bit; only the first writes the run",
    full={"counts": (1, 2)},
)
def test_E1_two_machines_compute_the_same_as_one(tmp_path: Path, counts: tuple[int, ...] = (1,)) -> Figures:
    """`counts`: processes on each machine."""
    figures = Figures()
    for processes in counts:
        folder, case = tmp_path / f"by{processes}", f"{processes} processes on each of 2 machines"
        expected, codes, text = on_one_machine(folder / "one", processes=2 * processes)
        if not figures.count(codes == [0], f"one machine: exit codes {codes}{text}"):
            continue
        for node in ("node0", "node1"):
            write_node(folder / node)
        with two_machines(folder) as machines:
            job = start_on(machines, folder, processes=processes)
            codes = job.wait()
        if figures.count(codes == [0, 0], f"{case}: exit codes {codes}{job.text()}"):
            compare(figures, folder / "node0/run", expected, case)
            figures.count(not (folder / "node1/run").exists(), f"{case}: the second wrote {os.listdir(folder)}")
    return figures


LONG = {"max_epochs": 8, "save_every": 1, "keep_checkpoints": 3}  # 64 steps


def prepare_machines(tmp_path: Path, case: str, figures: Figures, **changes: object) -> tuple[Path, Path]:
    """The reference run on one machine (run once), and a folder with the files of two machines."""
    if not (tmp_path / "one/run").exists():
        _, codes, text = on_one_machine(tmp_path / "one", processes=2, **LONG)
        figures.count(codes == [0], f"one machine: exit codes {codes}{text}")
    folder = tmp_path / case.replace(" ", "-")
    for node in ("node0", "node1"):
        write_node(folder / node, **LONG, **changes)
    return tmp_path / "one/run", folder


def power_off_both(machines: tuple[Machine, Machine], job: Job) -> tuple[int, ...]:
    for machine in machines:
        machine.power_off()
    return (-signal.SIGKILL,)


def power_off_second(machines: tuple[Machine, Machine], job: Job) -> tuple[int, ...]:
    """The first machine must notice the lost connection."""
    machines[1].power_off()
    return (-signal.SIGKILL, 1)


def stop_second(machines: tuple[Machine, Machine], job: Job) -> tuple[int, ...]:
    """SIGTERM to the launcher of one machine: the workers of both stop after the same step."""
    job.processes[1].send_signal(signal.SIGTERM)
    return (1,)


@row(
    "E2",
    "both machines lose power; one does; one gets SIGTERM; both lose power and swap their ranks",
    "all end in time; the same commands resume from the newest checkpoint of either machine, to the same bits",
    full={
        "ways": (
            "both lose power",
            "the second loses power",
            "the second is stopped",
            "both lose power and swap ranks",
        )
    },
)
def test_E2_a_run_on_two_machines_resumes(
    tmp_path: Path, ways: tuple[str, ...] = ("both lose power and swap ranks",)
) -> Figures:
    figures = Figures()
    for way in ways:
        expected, folder = prepare_machines(tmp_path, way, figures)
        interrupt = stop_second if "stop" in way else power_off_second if "second" in way else power_off_both
        first = 1 if "swap" in way else 0
        with two_machines(folder) as machines:
            job, run = start_on(machines, folder), folder / "node0/run"
            if not figures.count(reached(run, 3, job), f"{way}: no checkpoint of step 3{job.text()}"):
                continue
            started = time.monotonic()
            allowed = interrupt(machines, job)
            codes = job.wait(MAX_SECONDS)
            figures.seconds.append(time.monotonic() - started)
            figures.count(
                all(code in allowed for code in codes), f"{way}: exit codes {codes}, expected {allowed}{job.text()}"
            )
            figures.count(
                not (run / "train_results.json").exists(), f"{way}: the run had ended before it was interrupted"
            )
            step = newest_step(run)
            job = start_on(machines, folder, first=first)
            codes = job.wait()
        figures.count(codes == [0, 0], f"{way}: started again: exit codes {codes}{job.text()}")
        figures.count(
            f"step-{step:08d}" in job.outputs[first].read_text(), f"{way}: did not resume from step {step}{job.text()}"
        )
        figures.notes.append(f"{way}: resumed from step {step} of {losses(expected)[-1][0]}")
        if codes == [0, 0]:
            compare(figures, folder / f"node{first}/run", expected, way, after=step if first else 0)
            figures.count(first == 1 or not (folder / "node1/run").exists(), f"{way}: the second machine wrote a run")
    return figures


@row(
    "E3",
    "a worker on either machine is killed, MAX_RESTARTS=1",
    "torchrun restarts the workers of both machines; the same bits in the end",
    full={"kills": (0, 1)},
)
def test_E3_a_restart_takes_both_machines(tmp_path: Path, kills: tuple[int, ...] = (1,)) -> Figures:
    """`kills`: the machines whose worker is killed, one run for each."""
    figures = Figures()
    for index in kills:
        case = f"worker of machine {index} killed"
        expected, folder = prepare_machines(
            tmp_path, case, figures, resume="never"
        )  # which applies to the first start alone
        with two_machines(folder) as machines:
            job, run = start_on(machines, folder, MAX_RESTARTS="1"), folder / "node0/run"
            if not figures.count(reached(run, 3, job), f"{case}: no checkpoint of step 3{job.text()}"):
                continue
            os.kill(machines[index].workers()[0], signal.SIGKILL)
            codes = job.wait()
        if figures.count(codes == [0, 0], f"{case}: exit codes {codes}{job.text()}"):
            figures.count("resuming from" in job.outputs[0].read_text(), f"{case}: no resume{job.text()}")
            compare(figures, run, expected, case)
    return figures
