"""What configuration files can compute: `${cap:sizes,limit}` or `${cap:sizes,limit,least}`, `${share:of,part}`, `${either:value,default}`,
`${if_unlabeled:class,a,b}` and `${offline_without_key:}`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lesionbench.errors import SuiteError


def register() -> None:
    """Makes the resolvers known to OmegaConf; may be called again."""
    OmegaConf.register_new_resolver("cap", cap, replace=True)
    OmegaConf.register_new_resolver("either", either, replace=True)
    OmegaConf.register_new_resolver("share", share, replace=True)
    OmegaConf.register_new_resolver("if_unlabeled", if_unlabeled, replace=True)
    OmegaConf.register_new_resolver("offline_without_key", offline_without_key, replace=True)


def cap(sizes: Sequence[int] | None, limit: int | None, least: int = 1) -> list[int] | None:
    """Every size at most `limit`; null stays null, no limit changes nothing. Whole volumes (sizes null) become cubes of `limit`.

    A limit below `least` counts as `least`, for networks that take nothing smaller.
    """
    if sizes is not None and (isinstance(sizes, str) or not all(isinstance(s, int) and s > 0 for s in sizes)):
        raise SuiteError(f"patch={sizes}: expected voxels along each axis, as in patch=[64,64,64], or null")
    if limit is None:
        return None if sizes is None else list(sizes)
    limit = max(limit, least)
    return [limit] * 3 if sizes is None else [min(s, limit) for s in sizes]


def share(whole: int, part: float) -> int:
    """A share of a count, rounded, at least 1."""
    return max(1, round(whole * part))


def either(chosen: Any, default: Any) -> Any:
    """`chosen`, or `default` where it is null."""
    return default if chosen is None else chosen


def if_unlabeled(target: str, then: Any, otherwise: Any) -> Any:
    """`then` where the class of a method learns from unlabeled cases too, else `otherwise`."""
    from hydra.utils import get_class

    return then if "unlabeled" in getattr(get_class(target), "streams", ()) else otherwise


def offline_without_key() -> bool:
    """Whether Weights & Biases has no account to send to, so that a run is kept on disk."""
    netrc = Path.home() / ".netrc"
    return not (os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text()))
