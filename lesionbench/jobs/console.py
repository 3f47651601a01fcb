"""What is printed, once however many processes there are."""

import os


def _first_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0


def _say(text: str) -> None:
    if _first_process():
        print(text, flush=True)
