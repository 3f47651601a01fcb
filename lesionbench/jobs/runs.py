"""Jobs on finished runs: tune, compare, dashboard."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError, unknown
from lesionbench.jobs.console import say


def tune(cfg: DictConfig) -> None:
    """Chooses the smallest volume of a region on out-of-fold predictions and writes it to `out`, for `postprocessing.thresholds`."""
    from hydra.utils import instantiate

    from lightning_modules.evaluation.tuning import tune as tune_smallest_volume

    options = OmegaConf.to_container(cfg.tune, resolve=True)
    rules = instantiate(cfg.postprocessing, _convert_="all")
    out = Path(cfg.out or "thresholds.json")
    found = tune_smallest_volume(options.pop("runs") or [cfg.runs], rules=rules, trust=cfg.trust, **options)
    say(f"{found.report()}\nwritten to {found.write(out)}; apply it with postprocessing=tuned postprocessing.thresholds={out}")


def compare(cfg: DictConfig) -> None:
    """Compares run folders: table, costs and paired tests."""
    from lesionbench.reports.comparison import compare as compare_runs
    from lesionbench.reports.sheets import console, terminal_width

    if cfg.report not in (None, "html"):
        raise unknown("report", cfg.report, ["html", "null"])
    options = OmegaConf.to_container(cfg.compare, resolve=True)
    out = Path(cfg.out or "comparison") if cfg.out or cfg.report else None
    result = compare_runs(options.pop("runs") or [cfg.runs], out=out, **options)
    console().print(result.table(terminal_width()))
    if cfg.report and out:
        from lesionbench.reports.html_report import write_html

        say(f"open {write_html(result, out / 'report.html')}")
    if out:
        say(f"written to {out}")


def dashboard(cfg: DictConfig) -> None:
    """Makes a comparison workspace of the runs of `compare.runs` on W&B, or with `dashboard.dry_run` writes it to `out`."""
    from lesionbench.reports.dashboard import send, workspace, write

    options = cfg.dashboard
    if options.dry_run and not cfg.out:
        raise SuiteError("dashboard.dry_run=true needs out=<file>.json")
    made = workspace(cfg.compare.runs or [cfg.runs], list(cfg.compare.group_by), options.project, options.entity, options.name)
    say(f"written to {write(made, Path(cfg.out))}" if options.dry_run else send(made))
