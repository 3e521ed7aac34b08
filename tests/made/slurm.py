"""The commands of a Slurm cluster of one machine.

They start the script of a job at once, and again if it ends with 143 (requeue).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

COMMANDS = {
    "sbatch": """
        number=$RANDOM
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
        cp "$1" "$SLURM_TEST/script.sh"
        start() {
            while :; do bash "$1"; [ $? = 143 ] || break; done
        }
        if [ -z "$last" ]; then
            SLURM_JOB_ID=$number start "$1" >> "$SLURM_TEST/jobs.txt" 2>&1 &
        else
            for i in $(seq 0 "$last"); do
                SLURM_JOB_ID=$((number + i)) SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$i \\
                    start "$1" >> "$SLURM_TEST/jobs.txt" 2>&1 &
            done
        fi
        echo "Submitted batch job $number"
    """,
    "srun": """
        while [ "${1#--}" != "$1" ]; do case $1 in --output | --error) shift ;; esac; shift; done
        echo $$ >> "$SLURM_TEST/pids.txt"
        exec "$@"
    """,
    "sacct": "echo 'JobID|State|NodeList'",
}


def make_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the commands first in PATH.

    They write `script.sh`, `pids.txt` and `jobs.txt` into the folder.
    """
    for name, script in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_TEST", str(folder))
