"""The sweeper `optuna`: asks Optuna for values, has the launcher run them, tells Optuna what came out."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.errors import SuiteError
from lesionbench.study import Pruned, locked, open_study, running_trial

if TYPE_CHECKING:
    from optuna import Study, Trial

REPLICATES = ("seed", "data.split.seed", "data.split.fold")
DIRECTIONS = {"max": "maximize", "min": "minimize"}


@dataclass
class OptunaSearchConf:
    """Options of the sweeper, `hydra.sweeper.*`."""

    _target_: str = "hydra_plugins.lesionbench_optuna.optuna_search.OptunaSearch"
    trials: int = 20  # finished or pruned, over all starts of the sweep
    parallel: int = 1  # trials asked for and launched together
    seed: int = 0
    folder: str = "${runs}/studies"
    study: str | None = None  # name of the file in `folder`; by default experiment and a hash of what is searched
    params: dict[str, str] = field(default_factory=dict)  # key -> values, as on the command line, which goes before it
    sampler: Any = field(default_factory=lambda: {"_target_": "optuna.samplers.TPESampler", "_partial_": True, "constant_liar": True})
    pruner: Any = None  # of optuna.pruners; null = every trial runs to its end


ConfigStore.instance().store(group="hydra/sweeper", name="lesionbench_optuna", node=OptunaSearchConf, provider="lesionbench")


class OptunaSearch(Sweeper):
    """Searches for the values that make the runs' objective best.

    The study is kept in an SQLite file that is named for what is searched, so that the same command goes on with it: a trial that was
    running when the sweep died is run again with the values it had, finished ones are not. What a trial tries depends on the seed and
    the trials before it alone. Every job gets `resume=true`: a run that died goes on from its checkpoint, and values that were tried
    before cost nothing.

    The fields of `OptunaSearchConf` are the arguments.

    Raises:
        SuiteError: nothing to search, something that must not be searched, a study of another search, no trial that ever succeeds.
    """

    def __init__(
        self,
        trials: int,
        parallel: int,
        seed: int,
        folder: str,
        study: str | None,
        params: dict[str, str],
        sampler: Callable[..., Any],
        pruner: Any,
    ) -> None:
        if trials < 1 or parallel < 1:
            raise SuiteError(f"hydra.sweeper.trials={trials}, hydra.sweeper.parallel={parallel}: both must be at least 1")
        self.trials, self.parallel, self.seed = trials, parallel, seed
        self.folder, self.name, self.params = Path(folder).absolute(), study, dict(params)
        self.sampler = sampler

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        pruner = config.hydra.sweeper.pruner  # as plain data, for the runs build their own
        self.pruner = None if pruner is None else OmegaConf.to_container(pruner, resolve=True)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs trials until `trials` of the study are done; prints the best."""
        space, fixed = self._parsed(arguments)
        identity = self._identity(space)
        path = self._place(identity)
        with locked(path):
            study = self._study(path, identity)
            self._run(study, path, space, fixed)
        _report(study, path)

    # what is searched

    def _parsed(self, arguments: list[str]) -> tuple[dict[str, Override], list[str]]:
        """Keys to search, and the other overrides."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        lines = {**{k: f"{k}={v}" for k, v in self.params.items()}, **{a.partition("=")[0]: a for a in arguments}}
        parsed = parser.parse_overrides(list(lines.values()))
        space = {o.get_key_element(): o for o in sorted(parsed, key=Override.get_key_element) if o.is_sweep_override()}
        if not space:
            raise SuiteError(
                "nothing to search: give a key several values, as in 'model.optimizer.lr=interval(1e-4,1e-2)' model/loss=dice_ce,focal"
            )
        for key in REPLICATES:
            if key in space:
                raise SuiteError(f"{key} is not a setting to choose by its score; to repeat runs over it, use -m without a search")
        for override in space.values():
            _check_values(override)
        fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
        return space, fixed if "resume" in lines else [*fixed, "resume=true"]

    def _identity(self, space: dict[str, Override]) -> str:
        """`<experiment>-<hash>`: the same for the same search, wherever it runs."""
        from lesionbench.jobs.composition import run_name
        from lesionbench.jobs.run_folder import config_hash

        cfg = self.config.copy()
        with open_dict(cfg):
            experiment = run_name(cfg.hydra.runtime.choices)
            del cfg["hydra"]
        lines = sorted(o.input_line for o in space.values())
        text = json.dumps([config_hash(cfg), cfg.seed, self.seed, lines])
        return f"{experiment.replace('/', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _place(self, identity: str) -> Path:
        """The study's file: another one where there is a study of the same search on other cases."""
        path = self.folder / f"{self.name or identity}.db"
        known = open_study(path).user_attrs.get("cases") if path.exists() else None
        if known is None or (cases := self._cases()) == known:
            return path
        where = f"the cases under data.root={self.config.data.root}"
        if self.name:
            raise SuiteError(f"{path} is the study of other cases than {where}; choose another hydra.sweeper.study")
        print(f"{path} is the study of other cases than {where}, which get their own", flush=True)
        return path.with_stem(f"{path.stem}-{cases}")

    def _cases(self) -> str | None:
        """Which cases the runs are computed on; None where the configuration names no data."""
        from lesionbench.jobs.stages import fingerprint

        return fingerprint(self.config.data) if "_target_" in self.config.data else None

    def _study(self, path: Path, identity: str) -> "Study":
        objective = self.config.objective
        if objective.name is None:
            raise SuiteError("objective.name=null: the runs of this experiment return nothing that could be optimized")
        study = open_study(path, DIRECTIONS[objective.mode])
        if study.user_attrs.get("identity", identity) != identity:
            raise SuiteError(f"{path} is the study of another search ({study.user_attrs['identity']}); choose another hydra.sweeper.study")
        study.set_user_attr("identity", identity)
        study.set_user_attr("objective", objective.name)
        study.set_user_attr("pruner", self.pruner)
        return study

    # trials

    def _run(self, study: "Study", path: Path, space: dict[str, Override], fixed: list[str]) -> None:
        from optuna.trial import TrialState

        again = [t.number for t in study.get_trials(states=[TrialState.RUNNING])]
        left = self.trials - len(study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])) - len(again)
        if again or len(study.trials):
            print(f"{path}: {len(study.trials)} trial(s) so far, {len(again)} of them interrupted", flush=True)
        while again or left > 0:
            numbers, again = again[: self.parallel], again[self.parallel :]
            while len(numbers) < self.parallel and left > 0:
                numbers.append(study.ask().number)
                left -= 1
            jobs: dict[tuple[str, ...], list[int]] = {}  # equal values are run once
            for number in numbers:
                jobs.setdefault(self._values(study, number, space), []).append(number)
            batch = [[*fixed, *values, *self._watched(path, same[0])] for values, same in jobs.items()]
            returned = self.launcher.launch(batch, initial_job_idx=numbers[0])
            _tell(study, list(zip(jobs.values(), returned, strict=True)))
            if "cases" not in study.user_attrs:  # the runs have prepared them
                study.set_user_attr("cases", self._cases())
            _write(study, path.with_suffix(".csv"))

    def _values(self, study: "Study", number: int, space: dict[str, Override]) -> tuple[str, ...]:
        """The overrides of a trial; values that it was given before it was interrupted stay."""
        from lesionbench.keyed import key

        # a sampler of its own for each trial: one that went on drawing would begin anew with the sweep, and propose its first values again
        study.sampler = self.sampler(seed=key("search", self.seed, number) % 2**32)
        trial = running_trial(study, number)
        return tuple(f"{name}={_suggested(trial, name, override)}" for name, override in space.items())

    def _watched(self, path: Path, number: int) -> list[str]:
        if self.pruner is None:
            return []
        return [
            f"+callbacks.pruner={{_target_:callbacks.TrialPruner,study:'{path}',trial:{number},monitor:'{self.config.objective.name}'}}"
        ]


def _check_values(override: Override) -> None:
    """Refuses what a trial could not draw from, or would draw from otherwise than was meant."""
    value, line = override.value(), override.input_line
    if getattr(value, "tags", set()) - ({"log"} if isinstance(value, IntervalSweep) else set()):
        raise SuiteError(f"{line}: the one tag there is stands before an interval: tag(log,interval(1e-4,1e-2))")
    if isinstance(value, IntervalSweep) and not value.start < value.end:
        raise SuiteError(f"{line}: the first end has to be below the second")
    if isinstance(value, IntervalSweep) and "log" in value.tags and value.start <= 0:
        raise SuiteError(f"{line}: an interval has a logarithm only if both ends are above 0")


def _suggested(trial: "Trial", key: str, override: Override) -> Any:
    """A value for one key: an `interval` by its ends (`tag(log, ...)`: in their logarithm), a `range` of whole numbers by steps, anything
    else by choice.

    An interval with whole ends has whole values, both ends among them; a range ends before its second number, as in Hydra.
    """
    value = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return (trial.suggest_int if whole else trial.suggest_float)(key, value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        if len(numbers) > 1 and all(isinstance(n, int) for n in numbers):
            return trial.suggest_int(key, min(numbers), max(numbers), step=abs(numbers[1] - numbers[0]))
    return trial.suggest_categorical(key, list(override.sweep_string_iterator()))


def _tell(study: "Study", results: list[tuple[list[int], JobReturn]]) -> None:
    """Enters what came out of a batch; raises an error of a run where no run of the study ever succeeded, for it will be a mistake."""
    from optuna.trial import TrialState

    failure = None
    for numbers, result in results:
        value, state = None, TrialState.COMPLETE
        try:
            value = result.return_value
            if value is None:
                raise SuiteError(f"the run returned no objective; does its validation measure {study.user_attrs['objective']}?")
        except Pruned:
            state = TrialState.PRUNED
        except Exception as error:
            print(f"trial {numbers[0]} failed: {error}", flush=True)
            state, failure = TrialState.FAIL, error
        for number in numbers:
            study.tell(number, value, state=state)
    if failure is not None and not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED]):
        raise failure


def _write(study: "Study", path: Path) -> None:
    """The trials as a table beside the study."""
    keys = list(dict.fromkeys(key for trial in study.trials for key in trial.params))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "objective", "seconds", *keys])
        for trial in study.trials:
            seconds = "" if trial.duration is None else round(trial.duration.total_seconds(), 1)
            values = [trial.params.get(key, "") for key in keys]
            writer.writerow([trial.number, trial.state.name.lower(), "" if trial.value is None else trial.value, seconds, *values])


def _report(study: "Study", path: Path) -> None:
    from optuna.trial import TrialState

    complete = study.get_trials(states=[TrialState.COMPLETE])
    states = Counter(trial.state.name.lower() for trial in study.trials)
    print(f"{len(study.trials)} trials: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if complete:
        best = study.best_trial
        print(f"best: trial {best.number}, {study.user_attrs['objective']} {best.value:.4g}")
        print("  " + " ".join(f"{key}={value}" for key, value in best.params.items()))
    print(f"  {path.with_suffix('.csv')}\n  {path}")
