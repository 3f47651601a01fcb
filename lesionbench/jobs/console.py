"""What is printed, once however many processes there are."""

import os


def first_process() -> bool:
    """Whether this is the process that writes and prints; the others only compute."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0


def say(text: str) -> None:
    """Prints a line, in the first process alone."""
    if first_process():
        print(text, flush=True)
