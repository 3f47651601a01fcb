"""The study of a search: its trials in an SQLite file, opened by the sweeper and, for pruning, by the runs that it starts."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionbench import written
from lesionbench.errors import SuiteError
from lesionbench.installation import install
from lesionbench.written import whole

if TYPE_CHECKING:
    import optuna


class Pruned(Exception):
    """Raised inside a run that the search gave up."""


def open_study(path: Path, direction: str | None = None) -> "optuna.Study":
    """The study in file `path`, which is also its name.

    Args:
        path: SQLite file; made if it is new and a direction is given.
        direction: `maximize` or `minimize`; None = the study must exist.

    Raises:
        SuiteError: Optuna is not installed.
    """
    optuna = _optuna()
    if direction is not None and not path.exists():
        with whole(path) as temporary:  # another process, and the next one after a kill, finds tables and study or nothing
            storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
            optuna.create_study(study_name=path.stem, storage=storage, direction=direction)
            storage.engine.dispose()
    return optuna.load_study(study_name=path.stem, storage=f"sqlite:///{path}")


def running_trial(study: "optuna.Study", number: int) -> "optuna.Trial":
    """A trial that was asked for earlier or by another process, to suggest, to report and to prune with."""
    optuna = _optuna()
    return optuna.trial.Trial(study, study.trials[number]._trial_id)  # the number is all that is public, the constructor wants the id


def locked(path: Path) -> AbstractContextManager[Any]:
    """Only one sweep at a time works on the study in `path`; a lock goes with the process that held it.

    Raises:
        SuiteError: another one does.
    """
    refusal = f"{path}: another sweep is working on this study; hydra.sweeper.study=<name> begins one of its own"
    return written.locked(path.with_suffix(".lock"), refusal)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SuiteError(f"a search needs Optuna: {install('sweeps')}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
