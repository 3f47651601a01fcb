"""The program, the one entry point: `[job=...] [experiment=...] [key=value ...]`; `--help` says more."""

import errno
import os
import sys

# places, not programs, are at fault
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def main() -> None:
    """Composes the configuration and runs the job; mistakes of the user are answered in one screen, without a traceback."""
    from lesionbench.errors import SuiteError
    from lesionbench.jobs.command_line import help_text, named, own_folder, quoted, renamed
    from lesionbench.stopping import Stopped, stop_at_signals

    stop_at_signals()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # methods of the user's own; last, so that they hide nothing
    try:
        own, arguments = own_folder(named(sys.argv[1:]))
        arguments = renamed(arguments, own)
        if "--help" in arguments or "-h" in arguments:
            _print(help_text(own))
        else:
            sys.argv[1:] = arguments = quoted(arguments)
            _run(arguments)
    except SuiteError as error:
        if os.environ.get("LESIONBENCH_TRACEBACK"):
            raise
        from lesionbench.jobs.failed_jobs import notes

        sys.exit(f"error: {error}{notes(error)}")
    except Stopped as stopped:
        from multiprocessing import active_children

        from lesionbench.jobs.console import first_process

        for process in active_children():  # the signal may have been sent to this process alone
            process.terminate()
        if first_process():
            print(stopped, file=sys.stderr, flush=True)
        raise


def _print(text: str) -> None:
    """Prints; a reader that has seen enough, as in `--help | head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python writes when it ends goes nowhere


def _run(arguments: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here as they are, not printed by Hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lesionbench.errors import SuiteError
    from lesionbench.jobs.command_line import explain
    from lesionbench.jobs.failed_jobs import hand_on_errors, notes
    from lesionbench.written import is_full

    hand_on_errors()
    try:
        _hydra()
    except (HydraException, OmegaConfBaseException) as error:
        cause = _suite_error(error)
        if cause is None and os.environ.get("LESIONBENCH_TRACEBACK"):
            raise
        raise SuiteError(f"{cause or explain(error, arguments)}{notes(error)}") from error
    except OSError as error:
        if error.errno not in UNUSABLE or os.environ.get("LESIONBENCH_TRACEBACK"):
            raise
        if error.filename is None:  # while something was written to an open file
            raise SuiteError(
                f"{error.strerror}: a file of the run, the cache or out= could not be written on; what was complete is kept.{notes(error)}"
            ) from error
        raise SuiteError(
            f"{error.filename}: cannot be written or read ({error.strerror})\n"
            f"Other places are set by runs=, out= and data.cache=<folder>.{notes(error)}"
        ) from error
    except Exception as error:
        if not is_full(error) or os.environ.get("LESIONBENCH_TRACEBACK"):
            raise
        raise SuiteError(
            f"no space left for a file or for the study of a search; what was complete is kept: make room, and the same command goes on{notes(error)}"
        ) from error


def _suite_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an exception that Hydra wrapped while it built an object."""
    from lesionbench.errors import SuiteError

    while error is not None and not isinstance(error, SuiteError):
        error = error.__cause__ or error.__context__
    return error


def _hydra() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from lesionbench.installation import CONF
    from lesionbench.resolvers import register

    register()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(cfg: DictConfig) -> float | None:
        from lesionbench.jobs.composition import complete
        from lesionbench.jobs.main import run_job

        register()  # a launcher may have started another process
        complete(cfg, HydraConfig.get().runtime.choices)
        return run_job(cfg)

    job()
