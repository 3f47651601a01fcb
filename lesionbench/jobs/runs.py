"""Jobs on finished runs: tune, compare, dashboard."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError, unknown
from lesionbench.jobs.console import say


def tune(cfg: DictConfig) -> None:
    """Chooses rules for labels on out-of-fold predictions and writes them to `out`, for `postprocessing.thresholds`.

    `tune.what` is the smallest volume of a region, thresholds of probability, or where a region is suppressed.
    """
    from hydra.utils import instantiate

    from lightning_modules.evaluation import probability_tuning, suppression_tuning, tuning

    options = OmegaConf.to_container(cfg.tune, resolve=True)
    rules = instantiate(cfg.postprocessing, _convert_="all")
    runs, common = options["runs"] or [cfg.runs], {"data_root": options["data_root"], "trust": cfg.trust}
    of_region = {"region": options["region"], "metric": options["metric"], "rules": rules}
    if options["what"] == "volume":
        found: Any = tuning.tune(runs, grid=options["grid"], **of_region, **common)
    elif options["what"] == "thresholds":
        search = {"score": options["score"], "trials": options["trials"], "seed": cfg.seed}
        found = probability_tuning.tune(runs, decoding=rules.decoding, tell=say, **search, **common)
    elif options["what"] == "suppression":
        found = suppression_tuning.tune(runs, depth=options["depth"], **of_region, **common)
    else:
        raise unknown("tune.what", str(options["what"]), ["volume", "thresholds", "suppression"])
    out = Path(cfg.out or "thresholds.json")
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
