"""What a composed configuration still lacks: the name of the run, and the part of the benchmark's data that the method takes."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

_LOADING = ("fit", "test", "show")  # jobs that draw training samples


def complete(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Fills in `experiment_name`, narrows `data.streams` to those of the method, and lets the data load the maps that it writes.

    Args:
        cfg: changed in place.
        choices: group -> what was chosen (Hydra's `runtime.choices`).
    """
    with open_dict(cfg):
        cfg.experiment_name = cfg.experiment_name or run_name(choices)
        if cfg.job in _LOADING:
            _fit_data_to_method(cfg)


def run_name(choices: Mapping[str, Any]) -> str:
    """The experiment, or without one `<model>/<benchmark>`; on data of one's own choice `<model>/<data>`."""
    if choices["experiment"] != "none":
        return choices["experiment"]
    place = choices["benchmark"] if choices["benchmark"] != "none" else choices["data"]
    return f"{choices['model']}/{place}"


def _fit_data_to_method(cfg: DictConfig) -> None:
    from hydra.utils import get_class

    streams, method = OmegaConf.select(cfg, "data.streams"), get_class(cfg.model._target_)
    needed = method.streams_of(cfg.model)
    if streams is not None and set(needed) < set(streams):
        cfg.data.streams = {name: streams[name] for name in needed}
    written = method.maps_of(cfg.model)
    if written and cfg.data.extra_maps is None:
        cfg.data.extra_maps = written
