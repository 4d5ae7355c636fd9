"""The scripts for pods against stubs of gcloud, tmux and Python on PATH that record calls, answer from files and fail.

What the cloud really does is not tested here; that the flags exist was read off gcloud 528's own help.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from igrpo_jax.cli import parsing
from igrpo_jax.distributed import peers, preemption
from igrpo_jax.outputs.trackers import TRACKERS

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
NAMED = ("--name", "n1", "--zone", "us-east5-a")
SHAPE = ("--topology", "v5p:2x2x2")
SHARED = ("--shared", "10.0.0.2:/runs")
MAIN = ("--", "--config", "configs/tpu_v5p.py")
GRACE = "--config.checkpoint.preemption_grace=110"
GKE = (*NAMED, *SHAPE, "--cluster", "c1", "--image", "host/p/r/igrpo:1", "--shared", "gs://b", "--run", "first")

# Answers come from the file of their kind, "EXIT_CODE TEXT" a line; the last one stays. No file: nothing, and 0. What
# goes wrong is told on stderr. Where there is a folder "home" a worker's commands are run in it.
STUB = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" >>"$STUB/calls"
printf '\x1e' >>"$STUB/calls"
case "${0##*/} $*" in
  *"queued-resources describe"*) kind=request ;;
  *"queued-resources create"*) kind=create ;;
  *"queued-resources delete"*) kind=delete ;;
  *"tpu-vm describe"*) kind=slice ;;
  *"tpu-vm scp"*) kind=scp; [[ ! -f $5 ]] || cp "$5" "$STUB/sent.${6#*:}" ;;
  *"on_worker.sh status"*) kind=status ;;
  *"on_worker.sh start"*) kind=launch ;;
  *"tpu-vm ssh"*) kind=ssh ;;
  *) kind=${0##*/} ;;
esac
if [[ -d $STUB/home && $kind =~ ^(ssh|launch|status)$ ]]; then
  cd "$STUB/home"
  for word; do
    [[ $word != --command=* ]] || HOME=$PWD exec bash -c "${word#--command=}"
  done
fi
[[ -s $STUB/$kind ]] || exit 0
read -r code text <"$STUB/$kind"
[[ $(wc -l <"$STUB/$kind") -le 1 ]] || sed -i 1d "$STUB/$kind"
[[ -z $text ]] || if ((code)); then echo "$text" >&2; else echo "$text"; fi
exit "$code"
"""


class Cloud:
    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("gcloud", "python", "srun", "scontrol"):
            self.program(folder / "bin" / name, STUB)

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, **lines: list[str]) -> None:
        for kind, answers in lines.items():
            (self.folder / kind).write_text("".join(f"{line}\n" for line in answers))

    def run(self, script: str, *arguments: str, said: str = "", **environment: str) -> subprocess.CompletedProcess:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "STUB": str(self.folder), **environment}
        command = ["bash", str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, input=said)

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        calls = file.read_text().split("\x1e")[:-1] if file.exists() else []
        return [call.split("\0")[:-1] for call in calls]

    @property
    def verbs(self) -> list[str]:
        """What was done, a word each."""
        words = {"queued-resources create": "create", "queued-resources delete": "delete", "tpu-vm scp": "copy"}
        words |= {"queued-resources describe": "request?", "tpu-vm describe": "slice?", "on_worker.sh status": "run?"}
        words |= {"on_worker.sh setup": "setup", "on_worker.sh start": "launch"}
        lines = [" ".join(call) for call in self.calls]
        return [next((word for sign, word in words.items() if sign in line), line) for line in lines]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


FILES = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
SOURCED = ("common.sh", "slice.sh")
PEOPLES = [path.name for path in FILES if path.name not in (*SOURCED, "on_worker.sh")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_is_sound_bash(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if path.name not in SOURCED:
        assert re.match(r"#!/usr/bin/env bash\n# (.*\n)+set -E?euo pipefail\n", path.read_text())
        assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", "-P", ROOT, *FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", PEOPLES)
def test_help_shows_what_it_is_for_and_an_example(cloud, script):
    done = cloud.run(script, "--help")
    assert done.returncode == 0 and f"tpu_scripts/{script} --" in done.stdout and cloud.calls == []
    assert done.stdout[0].isupper() and "#" not in done.stdout
    if "parse_flags" in (SCRIPTS / script).read_text():
        used = re.search(r"^parse_flags (.*) -- ", (SCRIPTS / script).read_text(), re.MULTILINE)[1].split()
        assert re.findall(r"^  --(\S+) +\S", done.stdout, re.MULTILINE) == [*used, "dry-run"]


# Script, its arguments, and a line of what it prints.
DRY = [
    (
        "create.sh",
        [*NAMED, *SHAPE, *SHARED, "--spot"],
        "queued-resources create n1 --node-id=n1 --accelerator-type=v5p-16",
    ),
    ("setup.sh", [*NAMED, *SHARED], "on_worker.sh\\ setup\\ 10.0.0.2:/runs"),
    (
        "launch.sh",
        [*NAMED, "--run", "r1", *MAIN],
        "on_worker.sh\\ start\\ r1\\ --config\\ configs/tpu_v5p.py\\ ",
    ),
    ("logs.sh", [*NAMED], "on_worker.sh\\ follow\\ igrpo"),
    ("resume.sh", [*NAMED, *SHAPE, *SHARED, *MAIN], "queued-resources delete n1 --force"),
    ("gke.sh", [*GKE, *MAIN], "gcloud container node-pools create n1 --cluster=c1 --zone=us-east5-a"),
    ("fetch.sh", ["--shared", "gs://b"], "gcloud storage rsync --recursive gs://b/runs/igrpo.logs runs/igrpo.logs"),
    ("fetch.sh", [*NAMED, *SHARED], "gcloud compute tpus tpu-vm scp n1:run.tar.gz"),
    (
        "delete.sh",
        [*NAMED, "--project", "p1"],
        "queued-resources delete n1 --force --zone=us-east5-a --quiet --project=p1",
    ),
    ("gpu_node.sh", ["--config", "x y.py"], "python -m igrpo_jax.main --config x\\ y.py"),
    (
        "slurm.sbatch",
        ["--config", "x y.py"],
        f"srun --label --kill-on-bad-exit=0 python -m igrpo_jax.main {GRACE} --config x\\ y.py",
    ),
]


@pytest.mark.parametrize(("script", "arguments", "line"), DRY, ids=[f"{row[0]}-{i}" for i, row in enumerate(DRY)])
def test_a_dry_run_prints_its_commands_and_calls_nothing(cloud, script, arguments, line):
    done = cloud.run(script, "--dry-run", *arguments)
    assert done.returncode == 0 and done.stderr == ""
    # shlex reads back what is printed: it can be pasted.
    assert line in done.stdout and shlex.split(done.stdout, comments=True)
    assert cloud.calls == [] and not (ROOT / "runs" / "igrpo").exists()


def test_a_dry_run_is_what_is_run(cloud):
    def commands(*more):
        done = cloud.run("create.sh", *NAMED, *SHAPE, *SHARED, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    cloud.answers(request=["0 ACTIVE"])
    printed = [shlex.split(line) for line in commands("--dry-run").splitlines() if line.startswith("gcloud")]
    commands()
    folder = re.compile(r".*/(?=igrpo_jax.tar.gz)")
    assert printed == [[folder.sub("./", word) for word in call] for call in cloud.calls] and len(printed) == 4


def test_a_slice_is_asked_for_awaited_and_set_up(cloud):
    cloud.answers(request=["0 WAITING_FOR_RESOURCES", "1 a network error", "0 PROVISIONING", "0 ACTIVE"])
    done = cloud.run("create.sh", *NAMED, "--topology=v6e:2x4", "--spot", *SHARED, "--poll", "0")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *["request?"] * 4, "copy", "setup"]
    create, copy, setup = cloud.calls[0], *cloud.calls[-2:]
    assert {"--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--node-id=n1", "--spot"} < set(create)
    assert "--zone=us-east5-a" in create and not any(word.startswith("--project") for word in create)
    assert {"--worker=all", "n1:igrpo_jax.tar.gz"} < set(copy) and "--worker=all" in setup
    assert setup[-3].endswith("bash igrpo_jax/tpu_scripts/on_worker.sh setup 10.0.0.2:/runs")
    with tarfile.open(cloud.folder / "sent.igrpo_jax.tar.gz") as sent:
        assert {"setup.py", "igrpo_jax/main.py", "configs/tiny_cpu.py"} <= set(sent.getnames())
        assert not any(name.startswith(".git/") or "__pycache__" in name for name in sent.getnames())
    assert not Path(copy[5]).parent.exists()


def test_the_checkout_is_packed_as_it_is_now(tmp_path):
    root, archive = tmp_path / "root", tmp_path / "archive.tar.gz"
    root.mkdir()
    for name in ("kept", "gone", "new one\n", "ignored", ".gitignore"):
        (root / name).write_text("ignored")
    done = subprocess.run("git init -q && git add kept gone .gitignore && rm gone", shell=True, cwd=root)
    script = f'source {SCRIPTS}/slice.sh && bash -o pipefail -c "$PACK" {root} {archive}'
    assert done.returncode == 0 and subprocess.run(["bash", "-c", script]).returncode == 0
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == [".gitignore", "kept", "new one\n"]


@pytest.mark.parametrize(
    ("topology", "name", "image"),
    [
        ("v5e:1x1", "v5litepod-1", "v2-alpha-tpuv5-lite"),
        ("v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p:2x2x2", "v5p-16", "v2-alpha-tpuv5"),
        ("v5p:8x8x16", "v5p-2048", "v2-alpha-tpuv5"),
        ("v6e:4x8", "v6e-32", "v2-alpha-tpuv6e"),
        ("v4:2x2x1", "v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_a_topology_has_its_name_among_accelerators(cloud, topology, name, image):
    printed = cloud.run("create.sh", *NAMED, "--topology", topology, *SHARED, "--dry-run").stdout
    assert f"--accelerator-type={name} --runtime-version={image} " in printed


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_cannot_be_granted_ends_it(cloud, state):
    cloud.answers(request=["0 PROVISIONING", f"0 {state}"])
    done = cloud.run("create.sh", *NAMED, *SHAPE, *SHARED, "--poll", "0")
    assert done.returncode == 1 and f"the request for slice n1 is {state}; why: gcloud compute tpus" in done.stderr
    assert cloud.verbs == ["create", "request?", "request?"]


def test_a_failing_gcloud_stops_what_would_follow(cloud):
    cloud.answers(create=["1 quota exceeded"], scp=["1 no route"], launch=["1 worker 3 failed"])
    done = cloud.run("create.sh", *NAMED, *SHAPE, *SHARED, "--poll", "0")
    assert done.returncode == 1 and cloud.verbs == ["create"]
    assert "quota exceeded\nslice n1 cannot be asked for, see above" in done.stderr
    done = cloud.run("setup.sh", *NAMED, *SHARED)
    assert done.returncode == 1 and cloud.verbs == ["create", "copy"]
    assert "no route\nnot all workers of slice n1 are set up; which and why stands above" in done.stderr
    done = cloud.run("launch.sh", *NAMED, *MAIN)
    assert done.returncode == 1 and "worker 3 failed\nrun igrpo was not started on all workers" in done.stderr


WRONG = [
    ("delete.sh", ["--zone", "z"], "--name: missing; give the name of the slice"),
    ("delete.sh", ["--name", "n1"], "--zone: missing; give the zone of the slice, such as us-east5-a"),
    ("create.sh", [*NAMED, *SHARED], "--topology: missing; give the chips and their grid"),
    ("create.sh", [*NAMED, *SHAPE], "--shared: missing; give the folder that all workers share: gs://BUCKET"),
    ("create.sh", [*NAMED, *SHAPE, "--shared", "/mnt/x"], "--shared /mnt/x: must be the folder that all workers share"),
    ("setup.sh", [*NAMED, "--shared", "gs://b; rm -rf ."], "--shared gs://b; rm -rf .: must be"),
    ("setup.sh", [*NAMED, *SHARED, "--environment", "no/file"], "--environment no/file: no such file"),
    ("delete.sh", [*NAMED, "--zoen", "z"], "--zoen: no such flag; there are --name --zone --project --yes --dry-run"),
    ("launch.sh", [*NAMED, "--spot", *MAIN], "--spot: no such flag"),
    ("delete.sh", [*NAMED, "now"], "now: not understood"),
    ("delete.sh", [*NAMED, "--project"], "--project: needs a value"),
    ("delete.sh", ["--name", "N 1", "--zone", "z"], "--name N 1: must be the name of the slice"),
    ("create.sh", [*NAMED, "--topology", "v5p-16", *SHARED], "--topology v5p-16: must be the chips and their grid"),
    ("create.sh", [*NAMED, "--topology", "v9:2x2", *SHARED], "--topology v9:2x2: must be the chips and their grid"),
    ("create.sh", [*NAMED, "--topology", "v5e:3x3", *SHARED], "--topology v5e:3x3: must be the chips and their grid"),
    ("create.sh", [*NAMED, "--topology", "v5p:4x4", *SHARED], "--topology v5p:4x4: must be the chips and their grid"),
    ("create.sh", [*NAMED, "--topology", "v5p:2x2x3", *SHARED], "--topology v5p:2x2x3: must be the chips and their"),
    ("launch.sh", [*NAMED, "--", "--config", "configs/nope.py"], "--config configs/nope.py: no such file in"),
    ("launch.sh", [*NAMED, "--", "--config=configs/nope.py"], "--config configs/nope.py: no such file in"),
    ("launch.sh", [*NAMED, "--dry-run", "--", "--config", "configs/nope.py"], "--config configs/nope.py: no such"),
    ("launch.sh", [*NAMED, *MAIN, "--config", "configs/nope.py"], "--config configs/nope.py: no such file in"),
    ("launch.sh", [*NAMED, "--", "--config.steps=3"], "--config: missing; name the configuration file"),
    ("launch.sh", [*NAMED, "--", "--config"], "--config: missing; name the configuration file"),
    ("launch.sh", [*NAMED, "--", "--config", "/etc/x.py"], "--config /etc/x.py: is not in the checkout"),
    ("resume.sh", [*NAMED, *SHAPE, *SHARED, "--", "--config", "nope.py"], "--config nope.py: no such file in"),
    ("launch.sh", [*NAMED], "give the arguments of igrpo_jax.main after --"),
    ("launch.sh", [*NAMED, "--run", "a b", *MAIN], "--run a b: must be the name of the run"),
    ("launch.sh", [*NAMED, *MAIN, "--workdir=x"], "--workdir=x: the folder is that of --run"),
    ("fetch.sh", [*SHARED], "--name, --zone: missing; 10.0.0.2:/runs is read through a worker"),
    ("gke.sh", [*GKE, "--secret", "HF_TOKEN=x", *MAIN], "--secret HF_TOKEN=x: must be the Kubernetes secret whose"),
    ("gpu_node.sh", [], "give the arguments of igrpo_jax.main"),
    ("slurm.sbatch", [], "give the arguments of igrpo_jax.main"),
]


@pytest.mark.parametrize(("script", "arguments", "said"), WRONG, ids=[f"{row[0]}-{i}" for i, row in enumerate(WRONG)])
def test_bad_input_is_one_line(cloud, script, arguments, said):
    done = cloud.run(script, *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert cloud.calls == []


TPUS = ["v5e:16x16", "v6e:2x4", "v6e:8x16", "v5p:2x2x1", "v5p:2x4x4", "v5p:4x4x8", "v5p:16x16x24", "v4:2x2x4"]


@pytest.mark.parametrize("topology", TPUS)
def test_the_slices_that_google_offers_are_taken(cloud, topology):
    done = cloud.run("create.sh", "--dry-run", *NAMED, "--topology", topology, *SHARED)
    assert done.returncode == 0 and "--accelerator-type=v" in done.stdout, done.stderr


def test_a_config_file_that_the_workers_will_not_have_is_refused(cloud, tmp_path):
    """One that git ignores, in a copy of the scripts; one in the shared folder cannot be seen from here."""
    copy = tmp_path / "copy"
    shutil.copytree(SCRIPTS, copy / "tpu_scripts")
    for name in ("mine.py", "hidden.py"):
        (copy / name).write_text("")
    (copy / ".gitignore").write_text("hidden.py\n")
    subprocess.run(["git", "init", "-q", copy], check=True)
    for file, refusal in (("mine.py", ""), ("hidden.py", "hidden.py: git ignores it"), ("../shared/a.py", "")):
        command = [copy / "tpu_scripts" / "launch.sh", *NAMED, "--dry-run", "--", "--config", file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == (2 if refusal else 0) and refusal in done.stderr, done.stderr


def test_without_gcloud_it_says_where_to_get_it(cloud):
    for tool in ("bash", "dirname", "sed"):
        (cloud.folder / "tools").mkdir(exist_ok=True)
        (cloud.folder / "tools" / tool).symlink_to(shutil.which(tool))
    done = cloud.run("delete.sh", *NAMED, "--yes", PATH=str(cloud.folder / "tools"))
    assert done.returncode == 2 and "gcloud: not on PATH; install" in done.stderr


def test_nothing_is_deleted_unasked(cloud):
    for said in ("", "n2\n", "y\n"):
        done = cloud.run("delete.sh", *NAMED, said=said)
        assert done.returncode == 2 and "nothing is deleted; type n1, or give --yes" in done.stderr and not cloud.calls
    assert cloud.run("delete.sh", *NAMED, said="n1\n").returncode == 0
    assert cloud.run("delete.sh", *NAMED, "--yes").returncode == 0
    assert cloud.verbs == ["delete"] * 2 and cloud.calls[0][4:7] == ["delete", "n1", "--force"]


def resume(cloud, *more):
    return cloud.run("resume.sh", *NAMED, *SHAPE, *SHARED, "--poll", "0", "--spot", *more, *MAIN)


BEGIN, LOOK = ["copy", "setup", "launch"], ["request?", "slice?", "run?"]
RENEW = ["create", "request?", *BEGIN]


def test_a_run_goes_on_after_preemptions(cloud):
    """The run is launched, goes on and is preempted; then the slice is gone; then the run ends."""
    cloud.answers(request=["0 ACTIVE"] * 4 + ["0 SUSPENDING", "0 SUSPENDED", "0 ACTIVE"], slice=["0 READY"])
    cloud.answers(status=["0 absent", "0 running", "0 75", "0 running", "0 0"])
    done = resume(cloud)
    assert done.returncode == 0, done.stderr
    before, after = [*LOOK, *BEGIN, *LOOK, *LOOK, "launch", *LOOK], ["request?", "request?", "delete", *RENEW, *LOOK]
    assert cloud.verbs == [*before, *after]
    launches = [call for call in cloud.calls if "on_worker.sh start" in " ".join(call)]
    assert len(launches) == 3 and all(call == launches[0] for call in launches)
    assert "start igrpo --config" in launches[0][7] and "--worker=all" in launches[0]
    assert "--spot" in next(call for call in cloud.calls if "create" in call)


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_is_over_is_replaced(cloud, state):
    cloud.answers(request=[f"0 {state}", "0 ACTIVE"], slice=["0 READY"], status=["0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == ["request?", "delete", *RENEW, *LOOK]


@pytest.mark.parametrize("state", ["0 PREEMPTED", "1 NOT_FOUND: no such resource"])
def test_a_slice_that_an_active_request_has_lost_is_replaced(cloud, state):
    cloud.answers(request=["0 ACTIVE"], slice=[state, "0 READY"], status=["0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == ["request?", "slice?", "delete", *RENEW, *LOOK]


def test_a_slice_that_is_not_there_is_asked_for(cloud):
    cloud.answers(request=["1 NOT_FOUND: no such resource", "0 ACTIVE"], slice=["0 READY"], status=["0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == ["request?", *RENEW, *LOOK]


def test_nothing_is_deleted_where_the_cloud_cannot_be_asked(cloud):
    cloud.answers(request=["1 a network error", "0 ACTIVE"], slice=["1 a network error", "0 REPAIRING", "0 READY"])
    cloud.answers(status=["0 running", "0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == ["request?", *["request?", "slice?"] * 2, *LOOK, *LOOK]


def test_a_run_that_is_under_way_is_left_alone(cloud):
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], status=["0 running", "255 broken pipe", "0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == LOOK * 3


def test_a_launch_that_fails_on_a_worker_is_tried_again_from_the_setup(cloud):
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], launch=["1 worker 3", "0"])
    cloud.answers(status=["0 absent", "0 running", "0 1", "0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == [*LOOK, *BEGIN, *LOOK, *LOOK, *BEGIN, *LOOK]


def test_a_run_that_fails_is_not_started_again(cloud):
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], status=["0 running", "0 1"])
    done = resume(cloud)
    assert done.returncode == 1 and "run igrpo failed with exit code 1; why: logs.sh" in done.stderr
    assert cloud.verbs == LOOK * 3


def test_a_run_that_fails_because_a_worker_is_taken_away_goes_on(cloud):
    cloud.answers(request=["0 ACTIVE"] * 2 + ["0 SUSPENDED", "0 ACTIVE"], slice=["0 READY"])
    cloud.answers(status=["0 running", "0 1", "0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == [*LOOK, *LOOK, "request?", "delete", *RENEW, *LOOK]


def test_a_run_that_has_lost_a_process_of_another_worker_is_launched_again(cloud):
    """The slice stays, as where a host was out of memory; after one more look, since it may have been taken away."""
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], status=["0 running", "0 69", "0 69", "0 running", "0 0"])
    done = resume(cloud)
    assert done.returncode == 0 and "run igrpo lost a process on another worker (69): attempt 1 of 101" in done.stdout
    assert cloud.verbs == [*LOOK * 3, "launch", *LOOK * 2]


def test_a_run_that_has_lost_its_slice_with_a_process_is_not_launched_on_it(cloud):
    cloud.answers(request=["0 ACTIVE"] * 2 + ["0 SUSPENDED", "0 ACTIVE"], slice=["0 READY"])
    cloud.answers(status=["0 running", "0 69", "0 0"])
    assert resume(cloud).returncode == 0
    assert cloud.verbs == [*LOOK, *LOOK, "request?", "delete", *RENEW, *LOOK]


def test_the_scripts_know_the_exit_codes():
    for script, codes in (("resume.sh", [preemption.EXIT_CODE, peers.LOST]), ("slurm.sbatch", [preemption.EXIT_CODE])):
        assert re.findall(r"(?:PREEMPTED|LOST)=(\d+)", (SCRIPTS / script).read_text()) == [*map(str, codes)]
    assert peers.LOST < preemption.EXIT_CODE  # the highest of all processes is what srun returns


@pytest.mark.parametrize("code", [75, 69])
def test_restarts_are_bounded(cloud, code):
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], status=[f"0 {code}"])
    done = resume(cloud, "--restarts", "2")
    assert done.returncode == 1 and "--restarts 2 are used up" in done.stderr
    assert cloud.verbs.count("launch") == 3
    cloud.answers(slice=["1 NOT_FOUND"])
    (cloud.folder / "calls").unlink()
    done = resume(cloud, "--restarts", "1")
    assert done.returncode == 1 and cloud.verbs.count("delete") == 2
    assert "slice n1 is MISSING, and is replaced; --restarts 1 are used up" in done.stderr
    (cloud.folder / "calls").unlink()
    cloud.answers(request=["1 NOT_FOUND"], create=["1 quota"])
    assert resume(cloud, "--restarts", "1").returncode == 1 and cloud.verbs.count("create") == 2


def worker(cloud):
    """A worker's home whose tmux runs its command at once, and whose Python is the stub."""
    home = cloud.folder / "home"
    for folder in ("igrpo_jax", "shared"):
        (home / folder).mkdir(parents=True)
    (home / "igrpo_jax" / "tpu_scripts").symlink_to(SCRIPTS)
    cloud.program(home / "venv" / "bin" / "python", STUB)
    tmux = '#!/usr/bin/env bash\n[[ $1 != has-session ]] || exit 1\nshift 4\nexec "$@"\n'
    cloud.program(cloud.folder / "bin" / "tmux", tmux)
    cloud.program(cloud.folder / "bin" / "mountpoint", "#!/usr/bin/env bash\nexit 0\n")
    cloud.program(cloud.folder / "bin" / "findmnt", f"#!/usr/bin/env bash\necho {SHARED[1]}\n")
    return home


OVERRIDES = (
    '--config.refine.instruction=it\'s a "draft": {draft} $HOME `id` \\ \n*',
    "--config.x=1",
    "--config.data.instruction=é",
    *MAIN[1:],
)


def test_a_worker_runs_what_was_asked_and_keeps_how_it_ended(cloud):
    home = worker(cloud)
    cloud.answers(python=["75 said by the trainer", "0 said later"])
    for code in ("75", "0"):
        done = cloud.run("launch.sh", *NAMED, "--run", "r1", "--", *OVERRIDES)
        assert done.returncode == 0, done.stderr
        assert (home / "logs" / "r1" / "exit_code").read_text() == f"{code}\n"
    command = next(call for call in cloud.calls if call[0] == "python")
    assert command == ["python", "-m", "igrpo_jax.main", *OVERRIDES, "--workdir", "../shared/runs/r1"]
    said = "said by the trainer\nsaid later\n"
    assert (home / "logs" / "r1" / "log.txt").read_text() == said
    kept = list((home / "shared" / "runs" / "r1.logs").glob("*.txt"))
    assert len(kept) == 1 and kept[0].read_text() == said


def test_secrets_are_in_a_file_only(cloud):
    file = cloud.folder / "secrets"
    file.write_text("HF_TOKEN=hf_secret\nWANDB_API_KEY='a b'\n")
    asked = ("setup.sh", *NAMED, *SHARED, "--environment", str(file))
    done = [cloud.run(*asked, "--dry-run"), cloud.run(*asked)]
    assert cloud.verbs == ["copy", "copy", "setup"] and "n1:environment" in cloud.calls[1]
    home = worker(cloud)
    shutil.copy(cloud.folder / "sent.environment", home / "environment")
    installs_nothing(cloud)
    assert on_worker(cloud, "setup", SHARED[1]).communicate()[0] == ""
    assert (home / "environment").stat().st_mode & 0o777 == 0o600
    shown = '#!/usr/bin/env bash\necho "$HF_TOKEN,$WANDB_API_KEY" >"$STUB/seen"\n'
    cloud.program(home / "venv" / "bin" / "python", shown)
    done += [cloud.run("launch.sh", *NAMED, *MAIN)]
    assert (cloud.folder / "seen").read_text() == "hf_secret,a b\n"
    texts = [one.stdout + one.stderr for one in done] + [(cloud.folder / "calls").read_text()]
    texts += [path.read_text() for path in home.glob("**/*.txt")]
    assert len(texts) == 6 and not any("hf_secret" in text or "a b" in text for text in texts)


TAKEN = {
    "JUDGE_KEY=a b": "a b",
    "JUDGE_KEY=pa$word`id`\\\\n": "pa$word`id`\\\\n",
    "export JUDGE_KEY='$HOME'": "$HOME",
    'JUDGE_KEY="a\'b" \t': "a'b",
    "JUDGE_KEY='a": "'a",
    "  JUDGE_KEY=x=#y\r": "x=#y",
    "JUDGE_KEY=": "",
}


@pytest.mark.parametrize(("line", "value"), TAKEN.items())
def test_a_secret_is_taken_as_it_stands(cloud, line, value):
    home = worker(cloud)
    (home / "environment").write_text(f"# judges\n\nFIRST=1\n{line}", newline="")
    given = ("--environment", str(home / "environment"))
    assert cloud.run("setup.sh", *NAMED, *SHARED, *given, "--dry-run").returncode == 0
    shown = '#!/usr/bin/env bash\nprintf "%s," "$FIRST" "$JUDGE_KEY" >"$STUB/seen"\n'
    cloud.program(home / "venv" / "bin" / "python", shown)
    assert cloud.run("launch.sh", *NAMED, *MAIN).returncode == 0
    assert (cloud.folder / "seen").read_text() == f"1,{value},"


def test_a_line_that_is_no_secret_is_refused_by_its_number(cloud):
    file = cloud.folder / "secrets"
    file.write_text("# judges\n\nHF_TOKEN=x\nhf_secret\n")
    done = cloud.run("create.sh", *NAMED, *SHAPE, *SHARED, "--environment", str(file))
    assert done.returncode == 2 and f"--environment {file}: line 4 is not NAME=value" in done.stderr
    assert "hf_secret" not in done.stderr and cloud.calls == []


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("hf_secret", "line 2 of the --environment file is not NAME=value", 2),
        ("A B=hf_secret", "line 2 of the --environment file is not NAME=value", 2),
        ("UID=1", "UID: readonly variable", 1),
    ],
)
def test_a_secret_that_cannot_be_set_ends_the_run_and_is_not_taken_for_a_preemption(cloud, line, said, code):
    home = worker(cloud)
    (home / "environment").write_text(f"HF_TOKEN=x\n{line}\n")
    assert cloud.run("launch.sh", *NAMED, *MAIN).returncode == 0
    (log,) = (home / "shared" / "runs" / "igrpo.logs").iterdir()
    assert said in log.read_text() and "hf_secret" not in log.read_text()
    assert on_worker(cloud, "status", "igrpo").communicate()[0] == f"{code}\n"
    assert [call[0] for call in cloud.calls] == ["gcloud"]


def on_worker(cloud, *arguments):
    path = f"{cloud.folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "STUB": str(cloud.folder), "HOME": str(cloud.folder / "home")}
    command = ["bash", SCRIPTS / "on_worker.sh", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def installs_nothing(cloud):
    for path in (cloud.folder / "home" / ".local" / "bin" / "uv", cloud.folder / "bin" / "python3"):
        cloud.program(path, "#!/usr/bin/env bash\nexit 0\n")


@pytest.mark.parametrize(
    ("export", "taken"), [("10.0.0.2:/runs", True), ("10.0.0.2:/runs/", True), ("other:/r", False)]
)
def test_another_folder_than_the_one_that_is_mounted_is_refused(cloud, export, taken):
    worker(cloud)
    installs_nothing(cloud)
    run = on_worker(cloud, "setup", export)
    said = run.communicate()[0]
    assert (run.returncode, said) == (0, "") if taken else (run.returncode, len(said.splitlines())) == (1, 1)
    assert taken or "--shared other:/r: 10.0.0.2:/runs is mounted in its place; end the runs" in said


TRAINER = """
import signal, sys, time
def save(*_):
    time.sleep(0.2)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
time.sleep(20)
"""


def test_a_signal_lets_the_trainer_save_and_its_exit_code_be_kept(cloud):
    home = worker(cloud)
    cloud.program(home / "venv" / "bin" / "python", f"#!{sys.executable}\n{TRAINER}")
    path = f"{cloud.folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOME": str(home)}
    command = ["bash", SCRIPTS / "on_worker.sh", "run", "r1"]
    run = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    log, deadline = home / "logs" / "r1" / "log.txt", time.monotonic() + 20
    while not (log.exists() and "up" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in (signal.SIGHUP, signal.SIGTERM):  # to all that run in the session, as when a machine is shut down
        os.killpg(run.pid, number)
    run.wait(20)
    assert (home / "logs" / "r1" / "exit_code").read_text() == "75\n" and log.read_text() == "up\nsaved\n"


def test_the_state_of_a_run_is_read_off_the_worker(cloud):
    home = worker(cloud)
    cloud.answers(request=["0 ACTIVE"], slice=["0 READY"], python=["3 broken"])
    assert cloud.run("launch.sh", *NAMED, *MAIN).returncode == 0
    for files, sessions, said in ((True, 1, "3"), (False, 0, "running"), (False, 1, "absent")):
        if not files:
            (home / "logs" / "igrpo" / "exit_code").unlink(missing_ok=True)
        cloud.program(cloud.folder / "bin" / "tmux", f"#!/usr/bin/env bash\nexit {sessions}\n")
        assert on_worker(cloud, "status", "igrpo").communicate()[0] == f"{said}\n"


def test_a_worker_without_the_shared_folder_starts_nothing(cloud):
    worker(cloud)
    cloud.program(cloud.folder / "bin" / "mountpoint", "#!/usr/bin/env bash\nexit 1\n")
    done = cloud.run("launch.sh", *NAMED, *MAIN)
    assert done.returncode == 1 and "no shared folder; run setup.sh" in done.stderr
    assert "was not started on all workers" in done.stderr and [call[0] for call in cloud.calls] == ["gcloud"]


def test_a_bucket_is_not_mounted_and_gets_the_run_and_its_log(cloud):
    home = worker(cloud)
    cloud.program(cloud.folder / "bin" / "mountpoint", "#!/usr/bin/env bash\nexit 1\n")
    installs_nothing(cloud)
    assert on_worker(cloud, "setup", "gs://b").communicate()[0] == "" and cloud.calls == []
    assert cloud.run("launch.sh", *NAMED, "--run", "r1", *MAIN).returncode == 0
    command = next(call for call in cloud.calls if call[0] == "python")
    assert command[-2:] == ["--workdir", "gs://b/runs/r1"]
    copied = next(call for call in cloud.calls if "cp" in call)
    assert copied[:5] == ["gcloud", "storage", "cp", "--quiet", "logs/r1/log.txt"]
    assert copied[5].startswith("gs://b/runs/r1.logs/") and copied[5].endswith(".txt")
    mount = "#!/usr/bin/env bash\nexit 0\n"
    cloud.program(cloud.folder / "bin" / "mountpoint", mount)
    assert on_worker(cloud, "setup", SHARED[1]).communicate()[0] == "" and not (home / "bucket").exists()


@pytest.mark.parametrize(
    ("topology", "machine", "hosts", "chips", "kind"),
    [
        ("v5p:2x2x4", "ct5p-hightpu-4t", 4, 4, "tpu-v5p-slice"),
        ("v5e:1x1", "ct5lp-hightpu-1t", 1, 1, "tpu-v5-lite-podslice"),
        ("v6e:4x4", "ct6e-standard-4t", 4, 4, "tpu-v6e-slice"),
    ],
)
def test_a_jobset_has_a_pod_for_each_host_and_the_arguments_as_they_are(cloud, topology, machine, hosts, chips, kind):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; huggingface_hub brings it")
    cluster(cloud)
    cloud.answers(gcloud=["1 NOT_FOUND", "0 made"])
    given = [*GKE, "--topology", topology, "--spot", "--", *OVERRIDES]
    done = cloud.run("gke.sh", *given)
    assert done.returncode == 0, done.stderr
    create = cloud.calls[2]
    assert (
        create[3:5] == ["create", "n1"] and f"--machine-type={machine}" in create and f"--num-nodes={hosts}" in create
    )
    assert ("--tpu-topology=" + topology[4:] in create) == (hosts > 1) and "--spot" in create
    manifest = yaml.safe_load((cloud.folder / "manifest").read_text())
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (manifest["kind"], manifest["metadata"]["name"], job["parallelism"]) == ("JobSet", "first", hosts)
    assert job["completions"] == hosts and pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == kind
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    arguments = ["python", "-m", "igrpo_jax.main", GRACE, *OVERRIDES, "--workdir", "gs://b/runs/first"]
    assert [word.replace("$$(", "$(") for word in container["command"]] == arguments
    cloud.answers(gcloud=[f"0 {machine},{topology[4:] if hosts > 1 else ''},True"])  # the pool is there
    before = len(cloud.calls)
    assert cloud.run("gke.sh", *given).returncode == 0
    assert [call[0] for call in cloud.calls[before:]] == ["kubectl", "gcloud", "kubectl"]


POOL = "0 ct5p-hightpu-4t,2x2x2,"  # what SHAPE asks for


@pytest.mark.parametrize(
    ("pool", "spot", "there", "wanted"),
    [
        ("ct5p-hightpu-4t,2x2x4,", [], "ct5p-hightpu-4t, 2x2x4, no", "ct5p-hightpu-4t, 2x2x2, no"),
        ("ct5lp-hightpu-4t,2x2x2,False", [], "ct5lp-hightpu-4t, 2x2x2, no", "ct5p-hightpu-4t, 2x2x2, no"),
        ("ct5p-hightpu-4t,2x2x2,True", [], "ct5p-hightpu-4t, 2x2x2, yes", "ct5p-hightpu-4t, 2x2x2, no"),
        ("ct5p-hightpu-4t,2x2x2,", ["--spot"], "ct5p-hightpu-4t, 2x2x2, no", "ct5p-hightpu-4t, 2x2x2, yes"),
        ("n1-standard-4,,", [], "n1-standard-4, , no", "ct5p-hightpu-4t, 2x2x2, no"),
    ],
)
def test_another_node_pool_of_the_name_is_refused(cloud, pool, spot, there, wanted):
    """Its pods would be pending for ever, or cost more or less than was asked for."""
    cluster(cloud)
    cloud.answers(kubectl=["0 there Completed", "0"], gcloud=[f"0 {pool}"])
    run = cloud.run("gke.sh", *GKE, *spot, *MAIN)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert f"--name n1: a node pool of this name is there with machine, topology and spot = {there}, and" in run.stderr
    assert f"asks for {wanted}; give what it has, another --name, or delete it first: gcloud container" in run.stderr
    assert "node-pools delete n1 --cluster=c1 --zone=us-east5-a" in run.stderr
    assert [call[0] for call in cloud.calls] == ["kubectl", "gcloud"]  # neither made nor deleted


@pytest.mark.parametrize(
    ("state", "done", "said"),
    [
        ("0", ["get", "create"], ""),
        ("0 there", ["get"], "run first is under way, and is left as it is"),
        ("0 there StartupPolicyCompleted", ["get"], "kubectl delete jobset first"),
        ("0 there Completed", ["get", "delete", "create"], ""),
        ("0 there StartupPolicyCompleted Failed", ["get", "delete", "create"], ""),
        (
            "1 no such resource type",
            ["get"],
            "no such resource type\ngke.sh: error: kubectl cannot tell whether run first",
        ),
    ],
)
def test_a_jobset_that_has_ended_is_made_anew_and_one_under_way_is_left_alone(cloud, state, done, said):
    cluster(cloud)
    cloud.answers(kubectl=[state, "0"], gcloud=[POOL])
    run = cloud.run("gke.sh", *GKE, *MAIN)
    calls = [call for call in cloud.calls if call[0] == "kubectl"]
    assert [call[1] for call in calls] == done and run.returncode == int(state[0]) and said in run.stdout + run.stderr
    assert (cloud.folder / "manifest").exists() == ("create" in done)
    if "delete" in done:  # its pods too, before the new ones get their names
        assert calls[1][2:] == ["jobset", "first", "--cascade=foreground"]


def cluster(cloud):
    """A cluster whose kubectl keeps the manifest that it gets."""
    keeps = '[[ $* != *"-f -"* ]] || cat >"$STUB/manifest"\n'
    cloud.program(cloud.folder / "bin" / "kubectl", STUB.replace("case ", keeps + "case ", 1))


def test_kubernetes_puts_no_variable_into_an_argument(cloud):
    done = cloud.run("gke.sh", *GKE, "--dry-run", *MAIN, "--config.data.instruction=$(HOME) {prompt}")
    assert '"--config.data.instruction=$$(HOME) {prompt}"' in done.stdout


def test_a_worker_has_what_every_tracker_needs():
    extras = re.search(r"igrpo_jax\[(.*)\]", (SCRIPTS / "on_worker.sh").read_text())[1].split(",")
    assert set(TRACKERS) - {"tensorboard"} <= set(extras)  # tensorboardX comes with the package


def test_the_entries_of_a_secret_are_variables_of_every_pod(cloud):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; huggingface_hub brings it")
    seen = []
    for given in ([], ["--secret", "tokens"]):
        done = cloud.run("gke.sh", *GKE, *given, "--dry-run", *MAIN)
        manifest = yaml.safe_load(done.stdout.partition("<<'YAML'\n")[2].partition("YAML\n")[0])
        (slices,) = manifest["spec"]["replicatedJobs"]
        (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
        seen.append(container.pop("envFrom", None))
        assert container["command"][-1] == "gs://b/runs/first" and container["ports"]
    assert seen == [None, [{"secretRef": {"name": "tokens"}}]]


def test_a_worker_says_which_command_failed(cloud):
    home = worker(cloud)
    cloud.program(home / ".local" / "bin" / "uv", "#!/usr/bin/env bash\nexit 1\n")
    cloud.program(cloud.folder / "bin" / "python3", "#!/usr/bin/env bash\nexit 0\n")
    run = on_worker(cloud, "setup", "gs://b")
    assert ".local/bin/uv pip install" in run.communicate()[0] and run.returncode == 1


def test_results_come_from_the_bucket_or_from_worker_0(cloud, tmp_path):
    to = str(tmp_path / "here")
    bucket = ("--shared", "gs://b", "--to", to)
    assert cloud.run("fetch.sh", *bucket).returncode == 0
    results, logs = cloud.calls
    assert logs[-2:] == ["gs://b/runs/igrpo.logs", f"{to}/igrpo.logs"]
    assert results[-3:] == [
        "--exclude=^(checkpoints|damaged_checkpoints|export|reference)/",
        "gs://b/runs/igrpo",
        f"{to}/igrpo",
    ]
    assert cloud.run("fetch.sh", *bucket, "--checkpoints").returncode == 0
    assert cloud.calls[-2][-3:] == ["--recursive", "gs://b/runs/igrpo", f"{to}/igrpo"]


def test_results_come_through_worker_0_from_a_server(cloud, tmp_path):
    home, to = worker(cloud), tmp_path / "here"
    for name in ("metrics.jsonl", "checkpoints/5/state", "damaged_checkpoints/4.1/state"):
        (home / "shared" / "runs" / "r1" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "shared" / "runs" / "r1" / name).write_text(name)
    (home / "shared" / "runs" / "r1.logs").mkdir()
    brings = '[[ $* != *"scp n1:"* ]] || exec cp "$STUB/home/${5#*:}" "$6"\n'
    cloud.program(cloud.folder / "bin" / "gcloud", STUB.replace("case ", brings + "case ", 1))
    arguments = (*NAMED, *SHARED, "--run", "r1", "--to", str(to))
    assert cloud.run("fetch.sh", *arguments).returncode == 0

    def found():
        return sorted(str(path.relative_to(to)) for path in to.glob("**/*") if path.is_file())

    assert found() == ["r1/metrics.jsonl"] and (to / "r1.logs").is_dir() and "--worker=0" in cloud.calls[-1]
    assert cloud.run("fetch.sh", *arguments, "--checkpoints").returncode == 0
    assert found() == ["r1/checkpoints/5/state", "r1/damaged_checkpoints/4.1/state", "r1/metrics.jsonl"]

    # A run that has just begun, and one under way, whose files grow.
    (home / "shared" / "runs" / "r1.logs").rmdir()
    for code, expected in ((0, 0), (1, 0), (2, 1)):
        shutil.rmtree(to)
        stub = f'#!/usr/bin/env bash\n{shutil.which("tar")} "$@" || exit\n[[ $1 != -czf ]] || exit {code}\n'
        cloud.program(cloud.folder / "bin" / "tar", stub)
        done = cloud.run("fetch.sh", *arguments)
        assert (done.returncode, found()) == (expected, [] if expected else ["r1/metrics.jsonl"]), done.stderr
        assert "fetch.sh: no logs of r1 yet" in done.stderr
    missing = cloud.run("fetch.sh", *arguments[:-3], "r2", "--to", str(to))
    assert missing.returncode and "r2: Cannot stat" in missing.stderr and found() == []


def test_one_machine_of_gpus(cloud):
    dry = cloud.run("gpu_node.sh", "--dry-run", "--config", "configs/gpu_h100.py", XLA_FLAGS="--mine")
    assert "export XLA_CLIENT_MEM_FRACTION='0.92'\nexport XLA_FLAGS='--mine'\n" in dry.stdout
    old = cloud.run("gpu_node.sh", "--dry-run", "x", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5").stdout
    assert "export XLA_CLIENT_MEM_FRACTION='0.5'\n" in old  # its old name, which JAX refuses beside the new one
    cloud.answers(python=["75"])
    assert cloud.run("gpu_node.sh", "--config", "x.py", OVERRIDES[0]).returncode == 75
    assert cloud.calls == [["python", "-m", "igrpo_jax.main", "--config", "x.py", OVERRIDES[0]]]


@pytest.mark.parametrize(("script", "waits"), [("slurm.sbatch", "TERM@"), ("gke.sh", "GracePeriodSeconds: ")])
def test_a_run_saves_as_long_as_the_scheduler_waits_and_its_user_wants(script, waits):
    """What is left before the end is for the other processes and for the exit itself."""
    seconds = int(re.search(rf"{waits}(\d+)", (SCRIPTS / script).read_text())[1])
    grace = lambda *more: parsing.parse(["main", GRACE, *MAIN[1:], *more])[0].checkpoint.preemption_grace
    assert seconds - 20 < grace() < seconds
    assert grace("--config.checkpoint.preemption_grace=7") == 7


def test_slurm_queues_a_preempted_job_again(cloud):
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17"}
    for code, after in ((75, [["scontrol", "requeue", "17"]]), (0, []), (9, []), (69, [])):
        (cloud.folder / "calls").unlink(missing_ok=True)
        cloud.answers(srun=[f"{code}"])
        assert cloud.run("slurm.sbatch", "--config", "x.py", **environment).returncode == code
        first, *rest = cloud.calls
        assert first[0] == "srun" and first[-6:] == ["python", "-m", "igrpo_jax.main", GRACE, "--config", "x.py"]
        assert rest == after
    elsewhere = cloud.run("slurm.sbatch", "--config", "x.py", SLURM_SUBMIT_DIR="/nowhere")
    assert elsewhere.returncode == 2 and "submit from the checkout" in elsewhere.stderr
