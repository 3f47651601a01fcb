"""Search for the two hyper-parameters theta = (outlier quantile, number of clusters): Bayesian optimization, random or grid search.

Every proposal is a function of the evaluations so far and of the seed, so a search that was killed goes on from its log with the same
result. Quantiles lie on a grid (far finer than the loss can resolve), so that encoders fitted for one can be found again.
"""

import csv
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import numpy_generator, torch_seeded
from lesionbench.written import whole

STRATEGIES = ("bo", "random", "grid")
PROPOSALS = ("ei", "posterior_min")


@dataclass(frozen=True)
class Theta:
    """One setting: `quantile` gamma in [0, 1], `clusters` eta."""

    quantile: float
    clusters: int


@dataclass(frozen=True)
class Search:
    """How theta is searched for (Li et al., BrainLes 2021, Algorithm 1).

    Args:
        strategy: `bo`, `random` or `grid`.
        quantile: range of the outlier quantile. The paper's is [0, 1], but little is left of the data at its lower end.
        clusters: smallest and largest number of clusters.
        step: distance between quantiles.
        initial: random evaluations before the first surrogate (J).
        iterations: rounds after them; each evaluates one setting per entry of `proposals`. `random` and `grid` get as many evaluations.
        proposals: what a round evaluates: `ei` maximizes the expected improvement on the best loss so far (eq. 4), `posterior_min`
            minimizes the posterior mean of the surrogate, fitted again in between.
        patience: stop after so many rounds that did not improve the best loss by more than 1e-3; None = never.
        limit: upper bound on the evaluations (debugging); None = none.

    Raises:
        SuiteError: an unknown strategy or proposal, an empty range, fewer than two initial evaluations, a number below its least.
    """

    strategy: str = "bo"
    quantile: tuple[float, float] = (0.5, 1.0)
    clusters: tuple[int, int] = (3, 7)
    step: float = 0.01
    initial: int = 10
    iterations: int = 10
    proposals: tuple[str, ...] = PROPOSALS
    patience: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("quantile", "clusters", "proposals"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.strategy not in STRATEGIES:
            raise unknown("habitats.search.strategy", self.strategy, STRATEGIES)
        for name in self.proposals:
            if name not in PROPOSALS:
                raise unknown("habitats.search.proposals", name, PROPOSALS)
        (low, high), (fewest, most) = self.quantile, self.clusters
        if not 0 <= low <= high <= 1 or not 2 <= fewest <= most or self.step <= 0 or not self.proposals:
            raise SuiteError(
                f"habitats.search: quantile={list(self.quantile)} must rise within [0, 1], clusters={list(self.clusters)} from 2 on, "
                f"step={self.step} be positive, and proposals not be empty"
            )
        if self.initial < 2:
            raise SuiteError(f"habitats.search.initial={self.initial}: a surrogate needs two evaluations or more")
        for name, least in (("iterations", 0), ("patience", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SuiteError(f"habitats.search.{name}={value}: expected {least} or more")

    @property
    def budget(self) -> int:
        """Number of evaluations; no setting is evaluated twice."""
        wanted = self.initial + len(self.proposals) * self.iterations
        return min(wanted, len(self.settings()), self.limit or wanted)

    def quantiles(self) -> np.ndarray:
        """The quantiles that can be proposed."""
        low, high = self.quantile
        return np.round(np.linspace(low, high, round((high - low) / self.step) + 1), 10)

    def settings(self) -> np.ndarray:
        """Every theta that can be proposed: rows (quantile, clusters)."""
        fewest, most = self.clusters
        return np.array([(q, k) for k in range(fewest, most + 1) for q in self.quantiles()])

    def propose(self, done: Sequence[Theta], losses: Sequence[float], seed: object = 0) -> Theta:
        """The next setting, given those evaluated and their losses; never one of them.

        Raises:
            SuiteError: everything has been evaluated.
        """
        settings, place = self.settings(), len(done)
        if place >= len(settings):
            raise SuiteError(f"all {len(settings)} settings of habitats.search have been evaluated")
        evaluated = {(t.quantile, t.clusters) for t in done}
        fresh = np.array([tuple(s) not in evaluated for s in settings])
        if self.strategy == "grid":
            row = next(s for s in self._grid(settings) if tuple(s) not in evaluated)
        elif self.strategy == "random" or place < self.initial:
            order = numpy_generator("search", seed).permutation(len(settings))
            row = settings[next(i for i in order if fresh[i])]
        else:
            kind = self.proposals[(place - self.initial) % len(self.proposals)]
            with torch_seeded("surrogate", seed, place):  # restarts of the fit, should it need any
                row = settings[fresh][self._best_of(kind, settings[fresh], done, losses)]
        return Theta(float(row[0]), int(row[1]))

    def _grid(self, settings: np.ndarray) -> list[np.ndarray]:
        """`settings` in an order whose first `budget` rows are spread evenly, then the rest."""
        rounds = -(-self.budget // (self.clusters[1] - self.clusters[0] + 1))
        spread = self.quantiles()[np.unique(np.linspace(0, len(self.quantiles()) - 1, rounds).round().astype(int))]
        first = np.isin(settings[:, 0], spread)
        return [*sorted(settings[first], key=tuple), *settings[~first]]

    def _best_of(self, kind: str, rows: np.ndarray, done: Sequence[Theta], losses: Sequence[float]) -> int:
        import torch

        with warnings.catch_warnings():
            # settings next to each other make the kernel matrix singular in floating point; what GPyTorch adds to its diagonal is far below the losses' variance of 1
            warnings.filterwarnings("ignore", message="A not p.d., added jitter")
            surrogate = Surrogate(self, done, losses)
            acquisition = surrogate.expected_improvement() if kind == "ei" else surrogate.posterior_mean()
            with torch.no_grad():
                return int(acquisition(surrogate.scaled(rows)[:, None]).argmax())

    def converged(self, losses: Sequence[float]) -> bool:
        """Whether the last `patience` rounds brought nothing."""
        recent = len(self.proposals) * (self.patience or 0)
        if not recent or self.strategy != "bo" or len(losses) < self.initial + recent:
            return False
        return min(losses[:-recent]) - min(losses) <= 1e-3


class Surrogate:
    """A Gaussian process with RBF kernel (one length scale per parameter) on standardized losses, fitted by BoTorch."""

    def __init__(self, search: Search, done: Sequence[Theta], losses: Sequence[float]) -> None:
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.kernels import RBFKernel, ScaleKernel
        from gpytorch.mlls import ExactMarginalLogLikelihood
        from gpytorch.priors import GammaPrior

        self.search = search
        values = torch.tensor(losses, dtype=torch.float64)
        self.mean, self.std = float(values.mean()), float(values.std()) or 1.0
        self.values = (values - self.mean) / self.std
        kernel = ScaleKernel(RBFKernel(ard_num_dims=2, lengthscale_prior=GammaPrior(3.0, 6.0)), outputscale_prior=GammaPrior(2.0, 0.15))
        inputs = self.scaled(np.array([(t.quantile, t.clusters) for t in done]))
        self.model = SingleTaskGP(inputs, self.values[:, None], covar_module=kernel, outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(self.model.likelihood, self.model))

    def scaled(self, rows: np.ndarray) -> Any:
        """Settings (n, 2) in the unit square."""
        import torch

        low = np.array([self.search.quantile[0], self.search.clusters[0]], dtype=float)
        width = np.array([self.search.quantile[1], self.search.clusters[1]], dtype=float) - low
        return torch.from_numpy((rows - low) / np.where(width > 0, width, 1))

    def expected_improvement(self) -> Any:
        """log of the expected improvement on the smallest loss; its maximum is that of the expected improvement."""
        return expected_improvement(self.model, float(self.values.min()))

    def posterior_mean(self) -> Any:
        """Negative posterior mean: what is largest has the smallest expected loss."""
        from botorch.acquisition import PosteriorMean

        return PosteriorMean(self.model, maximize=False)

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and deviation of the loss of settings (n, 2)."""
        import torch

        with torch.no_grad():
            posterior = self.model.posterior(self.scaled(rows)[:, None])
        mean, variance = (v.reshape(-1).numpy() for v in (posterior.mean, posterior.variance))
        return mean * self.std + self.mean, np.sqrt(variance) * self.std


def expected_improvement(model: Any, best: float) -> Any:
    """log EI of a BoTorch model for minimization: EI = (f* - mu) Phi(z) + sigma phi(z), z = (f* - mu) / sigma (eq. 4)."""
    from botorch.acquisition import LogExpectedImprovement

    return LogExpectedImprovement(model, best, maximize=False)


class EvaluationLog:
    """Evaluations in order, as a CSV file that is whole at any moment; numbers come back exactly.

    Args:
        path: None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.rows = path, []
        if path is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    @property
    def thetas(self) -> list[Theta]:
        """The settings evaluated."""
        return [Theta(row["quantile"], int(row["clusters"])) for row in self.rows]

    @property
    def losses(self) -> list[float]:
        """Their joint losses."""
        return [row["loss"] for row in self.rows]

    @property
    def best(self) -> Theta:
        """The setting with the smallest loss; the first of equal ones."""
        return self.thetas[int(np.argmin(self.losses))]

    def append(self, row: Mapping[str, float]) -> None:
        """Adds an evaluation."""
        self.rows.append({k: float(v) for k, v in row.items()})
        if self.path is None:
            return
        with whole(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: repr(v) for k, v in r.items()} for r in self.rows)


def run_search(
    search: Search,
    evaluate: Callable[[Theta], Mapping[str, float]],
    log: EvaluationLog,
    *,
    seed: object = 0,
    watch: Callable[[int, Mapping[str, float]], None] = lambda number, row: None,
) -> Theta:
    """Evaluates settings until the budget is spent or nothing improves; returns the best one.

    Args:
        evaluate: theta -> results with `loss`; called once for every setting that `log` lacks.
        watch: told (number from 1, row) of every evaluation, those found in `log` included.
    """
    for number, row in enumerate(log.rows, start=1):
        watch(number, row)
    while len(log.rows) < search.budget and not search.converged(log.losses):
        theta = search.propose(log.thetas, log.losses, seed)
        log.append({"quantile": theta.quantile, "clusters": theta.clusters, **evaluate(theta)})
        watch(len(log.rows), log.rows[-1])
    return log.best
