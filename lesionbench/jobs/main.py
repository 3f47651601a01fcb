"""The jobs of the program: what each does with a composed configuration. Everything they build comes from the configuration's `_target_`s."""

from collections.abc import Callable

from omegaconf import DictConfig

from lesionbench.errors import unknown
from lesionbench.jobs.arguments import check_arguments
from lesionbench.jobs.data import check, export_dataset, plan, prepare, show, simulate
from lesionbench.jobs.methods import methods
from lesionbench.jobs.options import check_job, check_options
from lesionbench.jobs.predict import predict
from lesionbench.jobs.runs import compare, dashboard, tune
from lesionbench.jobs.stages import fit, test

_JUDGED = ("fit", "test", "predict", "check", "prepare", "show", "export_dataset", "plan", "tune")  # jobs whose options are judged first


def run_job(cfg: DictConfig) -> float | None:
    """Runs `cfg.job`; returns the sweep objective where the job has one.

    Raises:
        SuiteError: an unknown job, or whatever the job finds wrong with its input.
    """
    if cfg.job not in JOBS:
        raise unknown("job", cfg.job, JOBS)
    check_job(cfg)
    if cfg.job in _JUDGED:
        check_options(cfg)
        check_arguments(cfg)
    return JOBS[cfg.job](cfg)


JOBS: dict[str, Callable[[DictConfig], float | None]] = {
    "fit": fit, "test": test, "predict": predict, "tune": tune, "compare": compare, "check": check, "prepare": prepare, "simulate": simulate, "export_dataset": export_dataset, "plan": plan, "show": show, "dashboard": dashboard, "methods": methods,
}  # fmt: skip
