"""The model configuration of the ensemble that `ckpt` names."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.errors import SuiteError, unknown
from lesionbench.jobs.arguments import check_arguments
from lesionbench.jobs.console import say
from lesionbench.jobs.ensemble_members import best_per_fold, fingerprint, groups_of


def ensemble_model(cfg: DictConfig) -> dict[str, Any]:
    """The model configuration of the ensemble that `ckpt` names; fills in `ensemble.fingerprints`."""
    from lightning_modules import Ensemble

    target = f"lightning_modules.{Ensemble.__name__}"  # its public name, which the hash of the run and its checkpoints hold
    check_arguments(OmegaConf.create({"ensemble": {"_target_": target, **cfg.ensemble}}))
    options = OmegaConf.to_container(cfg.ensemble, resolve=True)
    policy, score, _ = options.pop("policy"), options.pop("score"), options.pop("fingerprints")
    groups = groups_of(cfg.ckpt if isinstance(cfg.ckpt, str) else OmegaConf.to_container(cfg.ckpt, resolve=True))
    if policy not in ("all", "best_per_fold"):
        raise unknown("ensemble.policy", policy, ["all", "best_per_fold"])
    chosen_on: tuple[str, ...] = ()
    if policy == "best_per_fold":
        if any(len(group) > 1 for group in groups):
            raise SuiteError("ensemble.policy=best_per_fold chooses among single checkpoints; ckpt has groups of several")
        candidates = best_per_fold([path for (path,) in groups], score)
        groups = [[c.path] for c in candidates if c.chosen]
        chosen_on = tuple(sorted({p for c in candidates for p in c.patients}))
        for c in candidates:
            say(f"{'kept   ' if c.chosen else 'dropped'} {score} score {c.score:.4f}  {c.path}")
    with open_dict(cfg):
        cfg.ensemble.fingerprints = [[fingerprint(path) for path in group] for group in groups]
    checkpoints = [group[0] if len(group) == 1 else group for group in groups]
    model = {"_target_": target, "checkpoints": checkpoints, **options, "chosen_on": list(chosen_on)}
    return {**model, "metrics": OmegaConf.to_container(cfg.metrics, resolve=True), "trust": list(cfg.trust), "seed": cfg.seed}
