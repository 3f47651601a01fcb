"""A comparison workspace on Weights & Biases, made from what the run folders hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionbench.errors import SuiteError
from lesionbench.installation import install
from lesionbench.reports.report import curve_names
from lesionbench.reports.runs import check_keys, find_runs, read_config
from lesionbench.results import write_json

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

OVERLAYS = [f"overlays/{name}" for name in ("best", "median", "worst")]


def workspace(
    runs: Sequence[Path | str], group_by: Sequence[str], project: str, entity: str | None = None, name: str = "comparison"
) -> "Workspace":
    """A workspace with test scores, curves, cases and settings of the runs, grouped as `job=compare` groups them.

    Which panels there are depends on what the runs have measured; their names are those that `callbacks.WandbRun` logs under.

    Args:
        runs: run folders, folders that hold some, or patterns.
        group_by: dotted config keys.
        project, entity: where the runs were sent; None = your default entity.
        name: of the workspace.

    Raises:
        SuiteError: no run, none that was tested or trained, a config key that no run has, or a package that is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise SuiteError(f"job=dashboard needs wandb-workspaces: {install('dashboard')}") from None
    folders = find_runs(runs)
    check_keys([read_config(folder) for folder in folders], group_by)
    tested, curves = _tested(folders), sorted({name for folder in folders for name in curve_names(folder)})
    if not tested and not curves:
        raise SuiteError(f"none of the {len(folders)} run folder(s) has results or curves to show")
    bars = [panels.BarPlot(title=metric, metrics=[_score(metric, r) for r in regions]) for metric, regions in tested.items()]
    lines = {
        part: [panels.LinePlot(title=c, x="iteration", y=[c]) for c in curves if c.startswith(f"{part}/")]
        for part in ("val", "train", "perf")
    }
    cases = [
        *(panels.MediaBrowser(title=key, media_keys=[key]) for key in OVERLAYS),
        panels.WeavePanelSummaryTable(table_name="test/cases"),
    ]
    sections = {
        "Test scores": bars,
        "Validation": lines["val"],
        "Training": lines["train"],
        "Cases": cases if tested else [],
        "Cost": lines["perf"],
        "Settings": [panels.RunComparer(diff_only=True)],
    }
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=parts, is_open=title != "Cost") for title, parts in sections.items() if parts],
        settings=ws.WorkspaceSettings(x_axis="iteration"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in group_by]),
    )


def write(made: "Workspace", path: Path) -> Path:
    """Writes a workspace as JSON, as it would be sent."""
    view = made._to_model()  # `save` sends this; there is no public way to see it
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return write_json(path, {"entity": made.entity, "project": made.project, "name": made.name, "spec": spec})


def send(made: "Workspace") -> str:
    """Makes the workspace on W&B and returns its address.

    Raises:
        SuiteError: there is no account to send it to.
    """
    from lesionbench.resolvers import offline_without_key

    if offline_without_key():
        raise SuiteError(
            "sending a dashboard needs a W&B account: `wandb login`, or WANDB_API_KEY; dashboard.dry_run=true out=<file>.json writes it to disk"
        )
    import wandb

    made.entity = made.entity or wandb.Api().default_entity
    return made.save().url


def _tested(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Metric -> regions that test summaries have of the main prediction, in order of appearance."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        path = folder / "test" / "summary.json"
        main: dict[str, Any] = json.loads(path.read_text()).get("", {}) if path.exists() else {}
        for region, metrics in main.items():
            for metric in metrics:
                known = found.setdefault(metric, [])
                known += [region] if region not in known else []
    return found


def _score(metric: str, region: str) -> str:
    return f"test/{metric}_{region}" if region else f"test/{metric}"
