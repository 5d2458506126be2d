"""The job script of docs/scale.md, run by bash with programs that stand in for Slurm's and ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
PYTHON = """#!/bin/bash
echo "$@" >> "$LOG"
trap 'sleep 0.1; exit 130' USR1
echo begun >> "$LOG"
for i in $(seq $TENTHS); do sleep 0.1; done
exit $CODE
"""


@pytest.mark.parametrize(
    ("tenths", "ends_as", "signalled", "code", "requeued"),
    [(600, 0, True, 130, True), (0, 0, False, 0, False), (0, 1, False, 1, False), (0, 2, False, 2, False)],
)
def test_a_job_whose_time_is_up_is_queued_again_and_others_are_not(
    tmp_path: Path, tenths: int, ends_as: int, signalled: bool, code: int, requeued: bool
) -> None:
    script = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]
    log = tmp_path / "log"
    for name, text in (("python", PYTHON), ("scontrol", '#!/bin/bash\necho "scontrol $@" >> "$LOG"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "TENTHS": str(tenths), "CODE": str(ends_as),
        "SLURM_JOB_ID": "7", "SCRATCH": str(tmp_path),
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment)
    deadline = time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    if signalled:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    said = log.read_text()
    assert f"+experiment=mine executor=ray continue={tmp_path}/runs/mine" in said
    assert ("scontrol requeue 7" in said) == requeued
