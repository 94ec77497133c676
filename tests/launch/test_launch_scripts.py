"""The launch scripts are sound shell and say what they would do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "launch"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))
COMMAND = ("train", "--gin_file=runs/pretrain.gin", "--gin.TEXTS=two words")

FLAGS = {
    "local.sh": ("--processes=2", "--devices=4", "--port=1234"),
    "slurm.sh": ("--nodes=4", "--gpus=8", "--time=1:00:00"),
    "tpu_pod.sh": ("--name=slice", "--zone=here"),
    "gke_jobset.sh": (
        "--name=run",
        "--image=image",
        "--accelerator=v5p",
        "--topology=2x2x2",
        "--hosts=2",
        "--claim=disk",
    ),
}
SAYS = {
    "local.sh": [
        "train --gin_file=runs/pretrain.gin --gin.TEXTS=two\\ words "
        "--gin.RuntimeConfig.coordinator_address=127.0.0.1:1234 --gin.RuntimeConfig.num_processes=2 "
        f"--gin.RuntimeConfig.num_cpu_devices=4 --gin.RuntimeConfig.process_id={process} &"
        for process in range(2)
    ],
    "slurm.sh": [
        "sbatch --time=1:00:00 --job-name=switch-t5 --nodes=4 --ntasks-per-node=8 --signal=TERM@120 --gpus-per-node=8",
        "exec srun --kill-on-bad-exit=1 switch-t5 train --gin_file=runs/pretrain.gin --gin.TEXTS=two\\ words "
        "--gin.RuntimeConfig.find_processes=True",
    ],
    "tpu_pod.sh": [
        "gcloud compute tpus tpu-vm ssh slice --zone=here --worker=all --command=switch-t5\\ train",
        "find_processes=True",
    ],
    "gke_jobset.sh": [
        "parallelism: 2",
        "gke-tpu-topology: '2x2x2'",
        "command: ['switch-t5', 'train', '--gin_file=runs/pretrain.gin', '--gin.TEXTS=two words', "
        "'--gin.RuntimeConfig.find_processes=True']",
    ],
}


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(FOLDER / script), *words], capture_output=True, text=True, check=False, timeout=60)


def test_each_script_has_its_test() -> None:
    assert sorted(FLAGS) == sorted(SAYS) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_what_would_be_done(script: str) -> None:
    done = run(script, *FLAGS[script], "--dry-run", *COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    for part in SAYS[script]:
        assert part in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_or_a_missing_command_is_one_sentence(script: str) -> None:
    first = FLAGS[script][0].partition("=")[0]
    for words, sentence in (
        ((*FLAGS[script], "--dry-run"), "is missing"),
        (("--what=1", "train"), "no flag --what=1"),
        ((first, "2", "train"), f"write {first}="),
    ):
        done = run(script, *words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{script}: ") and sentence in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_exit_code_is_that_of_the_process_that_failed_first(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/usr/bin/env bash\ncase $* in *process_id=1*) exit 7 ;; esac\nsleep 1\n")
    program.chmod(0o755)
    words = [str(FOLDER / "local.sh"), "train"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "SWITCH_T5": str(program)}
    )
    assert done.returncode == 7
    assert done.stderr == "local.sh: process 1 ended with code 7; the others have a minute to end.\n"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--hosts=2.5", "--hosts is a number of 1 or more, got 2.5."),
        ("--restarts=none", "--restarts is a number, got none."),
        ("--topology=2x2xtwo", "--topology is such as 4x4x8, got 2x2xtwo."),
        (
            "--topology=4x4x8",
            "a slice of 4x4x8 has 128 chips, which 2 hosts of 4 do not add up to; set --hosts or --chips.",
        ),
        (
            "--claim=disk\nhostNetwork: true",
            "--claim is a name of small letters, digits and hyphens, got disk\nhostNetwork: true.",
        ),
        ("--name=Run_1", "--name is a name of small letters, digits and hyphens, got Run_1."),
        ("--image=two words", "--image is a name without spaces, got two words."),
    ],
)
def test_a_job_set_that_no_cluster_could_run_is_refused(flag: str, sentence: str) -> None:
    done = run("gke_jobset.sh", *FLAGS["gke_jobset.sh"], flag, "--dry-run", "train")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gke_jobset.sh: {sentence}\n")


@pytest.mark.parametrize(
    ("script", "flag", "sentence"),
    [
        ("local.sh", "--port=70000", "--port is at most 65535, got 70000."),
        ("local.sh", "--processes=18446744073709551617", "18446744073709551617 is not a number from 1 to 999999."),
        ("slurm.sh", "--gpus=18446744073709551616", "--nodes and --gpus are numbers, got 1 and 18446744073709551616."),
        ("slurm.sh", "--time=", "write --time=VALUE, in one word."),
        ("tpu_pod.sh", "--name=--help", "--name is a TPU VM, and none is called --help."),
    ],
)
def test_a_value_that_cannot_be_is_refused(script: str, flag: str, sentence: str) -> None:
    done = run(script, flag, "--dry-run", "train")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{script}: {sentence}\n")


def test_a_number_with_a_leading_zero_is_refused_and_not_read_as_octal() -> None:
    done = run("slurm.sh", "--nodes=4", "--gpus=08", "--dry-run", "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "slurm.sh: --nodes and --gpus are numbers, got 4 and 08.\n"
