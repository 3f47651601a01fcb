"""The error of a job on its way through Hydra: raised as it is, and from a sweep with a note of the job that it comes from."""

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf


def hand_on_errors() -> None:
    """Has Hydra raise the error of a job and say nothing itself.

    Hydra writes `Error executing job with overrides: [...]` ahead of every error, wherever the job ran; `run.py` says what is wrong in
    words of its own, and a command of one job need not be told its own arguments. Results that other processes send back are opened in
    this one, so this holds for every launcher.
    """
    JobReturn.return_value = property(_returned, JobReturn.return_value.fset)


def _returned(result: JobReturn) -> Any:
    """What the job returned, or its error; one of a sweep gets a note (PEP 678) that `notes` and tracebacks show."""
    if result.status == JobStatus.COMPLETED:
        return result._return_value
    error = result._return_value
    if not OmegaConf.is_missing(result.hydra_cfg.hydra.job, "num"):  # only jobs of a sweep are numbered
        error.__notes__ = [f"in this job of the sweep: {' '.join(result.overrides)}"]
    raise error


def notes(error: BaseException) -> str:
    """The notes on an error, a line each with its newline before it."""
    return "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
