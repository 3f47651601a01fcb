"""A stage that writes distance maps of the labeled training cases into the map store."""

from pathlib import Path
from typing import Any

from lesionbench.errors import SuiteError
from lesionbench.results import write_json


def write_distance_maps(cfg: Any, folder: Path) -> Path:
    """A stage: one distance map of every labeled training case, from its whole label, so that patches know of structures outside of them.

    It reads from the configuration, under `distance`, what the maps are (see `lightning_modules.distances.DistanceMaps`). A
    `DistanceSupervised` finds them in its training samples, cut and moved with the image. A stage that was killed goes on, with
    resume=true, after the last map that is complete, as long as the maps lie in the folder of the run.

    Returns:
        `distance.json`: name and channels of the map, and the number of cases.

    Raises:
        SuiteError: no labeled training case; the disk is full.
    """
    from hydra.utils import instantiate

    from lesionbench.maps import MapStore
    from lesionbench.progress import tracked

    maps = instantiate(cfg.distance, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("test")
    cases = {case.id: case for part in ("train", "labeled") for case in data.parts[part] if case.label is not None}
    if not cases:
        raise SuiteError("distance maps: no training case has a label to measure distances to")
    store = MapStore(cfg.maps)
    own = cfg.resume and Path(cfg.maps).resolve() == (folder.parent / "maps").resolve()
    left = [case for case in cases.values() if not (own and store.is_pending(maps.name, case.id))]
    for case in tracked(left, len(left), "Measuring distances"):
        cached = data.store.open(case)
        store.write(maps.name, case.id, maps(cached.label(), data.task, cached.geometry.network_spacing))
    store.commit(maps.name)
    return write_json(folder / "distance.json", {"map": maps.name, "channels": maps.channels(data.task), "cases": len(cases)})
