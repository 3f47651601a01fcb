"""The default logger: curves as one long CSV table in the run folder."""

import csv
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lesionbench.written import full, is_full, whole

HEADER = ("iteration", "epoch", "name", "value")


class CurvesLogger(Logger):
    """Appends rows `iteration,epoch,name,value` to `<folder>/metrics.csv`, from rank zero.

    `iteration` is the value logged under that name, else the step that Lightning gives (which counts optimizer steps). Each call writes
    and closes the file, so a kill loses nothing that was logged.

    Args:
        folder: run folder.

    Attributes:
        muted: while True, what is logged is dropped.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self.muted = False
        self._place: int | None = None  # once the file was looked at

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def place(self) -> int:
        """Number of rows so far."""
        if self._place is None:
            self._place = len(self._rows())
        return self._place

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.muted:
            return
        values = {k: float(v) for k, v in metrics.items()}
        iteration = values.pop("iteration", step)
        epoch = values.pop("epoch", None)
        head = ["" if n is None else round(n) for n in (iteration, epoch)]
        # by name: Lightning's order is that in which the present process logged them first
        self._append([[*head, name, repr(value)] for name, value in sorted(values.items())])

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `config.yaml` of the run folder holds them."""

    @rank_zero_only
    def wind_back(self, place: int) -> None:
        """Cuts all rows after the first `place`, and a torn last line; to be called when a run resumes."""
        self._keep(self._rows()[:place])

    @rank_zero_only
    def truncate_after(self, iteration: int) -> None:
        """Cuts the rows of later iterations, and a torn last line: where it is not known after how many rows a run resumes."""
        self._keep([row for row in self._rows() if not row[0] or int(row[0]) <= iteration])

    def _rows(self) -> list[list[str]]:
        """The complete rows, without the header."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if _whole(row)]

    def _keep(self, rows: list[list[str]]) -> None:
        self._place = len(rows)
        if self.path.exists():
            with whole(self.path) as temporary:
                temporary.write_text(_lines([HEADER, *rows]), encoding="utf-8", newline="")

    def _append(self, rows: list[list[Any]]) -> None:
        self._place = self.place + len(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _lines(rows)
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                file.write(text if file.tell() else _lines([HEADER, *rows]))
        except OSError as error:  # half a line may be there, which a resume cuts off
            if is_full(error):
                raise full(self.path, len(text), shutil.disk_usage(self.folder).free) from error
            raise


def _lines(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _whole(row: list[str]) -> bool:
    """Whether a row of the table is complete; the header is not a row."""
    try:
        float(row[3])
        return row[0].lstrip("-").isdigit() or row[0] == ""
    except (IndexError, ValueError):
        return False
